"""Which column is the image and which the label: found by feature type, never by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np


@dataclasses.dataclass(frozen=True)
class Columns:
    """The two columns in use, the class names where the features carry them, and why these two."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    note: str


def find_columns(
    features: Mapping[str, Any] | None, columns: tuple[str | None, str | None] | None = None
) -> Columns:
    """Features of an HF data set -> Columns. `columns` = (image, label) overrides; None in it means "find it"."""
    if not features:
        raise ValueError(
            "the data set has no features, so its columns cannot be found by type: "
            "call .cast(datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[...])))"
        )
    want_image, want_label = columns or (None, None)
    for want in (want_image, want_label):
        if want is not None and want not in features:
            raise ValueError(
                f"no column {want!r}; the columns are {_listed(features)}.{_near(want, features)}"
            )
    image, image_note = (want_image, "given") if want_image else _image(features)
    label, label_note = (want_label, "given") if want_label else _label(features)
    feature = features[label]
    names = (
        tuple(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None
    )
    if not isinstance(feature, datasets.ClassLabel) and not _is_integer(feature):
        raise ValueError(
            f"label column {label!r} has type {feature}: expected ClassLabel or integers. {ENCODE}"
        )
    return Columns(
        image, label, names, f"image {image!r} ({image_note}), label {label!r} ({label_note})"
    )


ENCODE = "For a column of strings call dataset.class_encode_column(name)."


def is_image(feature: Any) -> bool:
    """True for datasets.Image and for its bare storage {"bytes", "path"}, which parquet files without metadata hold."""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}
    )


def _image(features: Mapping[str, Any]) -> tuple[str, str]:
    found = [name for name, feature in features.items() if is_image(feature)]
    if len(found) == 1:
        return found[0], "the only Image column"
    if not found:
        raise ValueError(
            f"no column of type datasets.Image; the columns are {_listed(features)}. "
            "Cast one with dataset.cast_column(name, datasets.Image())."
        )
    raise ValueError(
        f"{len(found)} Image columns: {', '.join(found)}. Say which with columns=(image, None)."
    )


def _label(features: Mapping[str, Any]) -> tuple[str, str]:
    classes = {n: f.num_classes for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    if classes:
        best = max(classes, key=lambda name: classes[name] or 0)
        others = ", ".join(name for name in classes if name != best)
        return (
            best,
            f"the most classes, {classes[best]}; not {others}"
            if others
            else "the only ClassLabel column",
        )
    integers = [name for name, feature in features.items() if _is_integer(feature)]
    if len(integers) == 1:
        return integers[0], "the only integer column"
    if integers:
        raise ValueError(
            f"no ClassLabel column and {len(integers)} integer columns: {', '.join(integers)}. "
            "Say which with columns=(None, label)."
        )
    raise ValueError(
        f"no label column: neither ClassLabel nor integers among {_listed(features)}. {ENCODE}"
    )


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {getattr(f, 'dtype', None) or type(f).__name__}" for name, f in features.items()
    )


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_labels(
    labels: np.ndarray,
    num_classes: int,
    split: str,
    rows: np.ndarray | None = None,
    *,
    unlabelled: bool = False,
) -> None:
    """Raise ValueError naming the first row whose label is not in 0 .. num_classes - 1, or -1 with `unlabelled`.

    rows  the rows' numbers
    """
    bad = np.flatnonzero((labels < (-1 if unlabelled else 0)) | (labels >= num_classes))
    if len(bad):
        row = int(bad[0] if rows is None else rows[bad[0]])
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        label = int(labels[bad[0]])
        advice = (
            "It is a row without a label: only rows to train on may be that, in a map-style data set that tells its "
            "labels before they are read (a label column, targets). Remove it."
            if label == -1 and not unlabelled
            else "Correct the labels, or pass the right num_classes=."
        )
        raise ValueError(
            f"split {split!r}, row {row}: label {label} is outside 0 .. {num_classes - 1}{more}. {advice}"
        )
