"""Which column is the image and which the label: found by feature type, never by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

ColumnNames = tuple[str | None, str | None]
"""(image, label) columns; None for one that is to be found by its type."""

ENCODE_HINT = "For a column of strings call dataset.class_encode_column(name)."


@dataclasses.dataclass(frozen=True)
class Columns:
    """The two columns in use.

    Attributes:
        image: Name of the image column.
        label: Name of the label column.
        class_names: Names of the classes, where the features have them.
        reason: Why these two, in words.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None
    reason: str


def find_columns(
    features: Mapping[str, object] | None, columns: ColumnNames | None = None
) -> Columns:
    """Find the image and the label column of an HF data set.

    Args:
        features: The data set's features, by column.
        columns: (image, label) columns to use; None in it means to find that one.

    Returns:
        The columns.

    Raises:
        ValueError: If there are no features, or a column is missing, ambiguous or of another type.
    """
    import datasets

    if not features:
        raise ValueError(
            "the data set has no features, so its columns cannot be found by type: "
            "call .cast(datasets.Features(image=datasets.Image(), "
            "label=datasets.ClassLabel(names=[...])))"
        )
    given_image, given_label = columns or (None, None)
    for name in (given_image, given_label):
        if name is not None and name not in features:
            raise ValueError(
                f"no column {name!r}; the columns are "
                f"{_list_columns(features)}.{_suggest(name, features)}"
            )
    image, image_reason = (given_image, "given") if given_image else _find_image_column(features)
    label, label_reason = (given_label, "given") if given_label else _find_label_column(features)
    feature = features[label]
    names: tuple[str, ...] | None = None
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names) if feature.names else None
    elif not _is_integer(feature):
        raise ValueError(
            f"label column {label!r} has type {feature}: expected ClassLabel or integers. "
            f"{ENCODE_HINT}"
        )
    reason = f"image {image!r} ({image_reason}), label {label!r} ({label_reason})"
    return Columns(image, label, names, reason)


def _is_image(feature: object) -> bool:
    """Whether it is `datasets.Image`, or its bare storage {"bytes", "path"}.

    Parquet files without metadata hold the latter.
    """
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    return isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}


def _find_image_column(features: Mapping[str, object]) -> tuple[str, str]:
    found = [name for name, feature in features.items() if _is_image(feature)]
    if len(found) == 1:
        return found[0], "the only Image column"
    if not found:
        raise ValueError(
            f"no column of type datasets.Image; the columns are {_list_columns(features)}. "
            "Cast one with dataset.cast_column(name, datasets.Image())."
        )
    raise ValueError(
        f"{len(found)} Image columns: {', '.join(found)}. Say which with columns=(image, None)."
    )


def _find_label_column(features: Mapping[str, object]) -> tuple[str, str]:
    import datasets

    num_classes = {
        name: feature.num_classes or 0
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if len(num_classes) == 1:
        return next(iter(num_classes)), "the only ClassLabel column"
    if num_classes:
        most = max(num_classes, key=lambda name: num_classes[name])
        others = ", ".join(name for name in num_classes if name != most)
        return most, f"the most classes, {num_classes[most]}; not {others}"
    integers = [name for name, feature in features.items() if _is_integer(feature)]
    if len(integers) == 1:
        return integers[0], "the only integer column"
    if integers:
        raise ValueError(
            f"no ClassLabel column and {len(integers)} integer columns: {', '.join(integers)}. "
            "Say which with columns=(None, label)."
        )
    raise ValueError(
        f"no label column: neither ClassLabel nor integers among {_list_columns(features)}. "
        f"{ENCODE_HINT}"
    )


def _is_integer(feature: object) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _list_columns(features: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name}: {getattr(feature, 'dtype', None) or type(feature).__name__}"
        for name, feature in features.items()
    )


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
