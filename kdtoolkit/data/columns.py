"""Which column is the image and which the label: by the name of the label, else by type."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

ColumnNames = tuple[str | None, str | None]
"""(image, label) columns; None for one that is to be found."""

# Names of label columns, in any case, the first that there is being taken.
LABEL_NAMES = (
    "label", "labels", "class", "classes", "target", "targets", "category", "categories",
    "fine_label", "class_label", "class_name", "label_name", "class_id", "label_id", "category_id",
    "classname", "species",
)  # fmt: skip
WEAK_LABEL_NAMES = ("y",)  # taken where no column is of type ClassLabel
NOT_LABELS = ("id", "index", "idx", "row", "width", "height", "__index_level_0__")
CHOOSE_HINT = "Say which with columns=(None, label)"


@dataclasses.dataclass(frozen=True)
class Columns:
    """The two columns in use.

    Attributes:
        image: Name of the image column.
        label: Name of the label column.
        class_names: Names of the classes, where the features have them.
        reason: Why these two, in words.
        is_sure: Whether the label column was given, has the name of one or is of type ClassLabel.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None
    reason: str
    is_sure: bool = True


def check_columns(columns: object) -> ColumnNames | None:
    """Check the option `columns`.

    Args:
        columns: What the user gave.

    Returns:
        (image, label), or None.

    Raises:
        ValueError: If it is not a pair of names or None.
    """
    if columns is None:
        return None
    if isinstance(columns, (tuple, list)) and len(columns) == 2:
        image, label = columns
        if all(name is None or (isinstance(name, str) and name) for name in columns):
            return image, label
    raise ValueError(
        f"columns={columns!r}: allowed is a pair of names (image, label), with None for one that "
        "is to be found, such as (None, 'species')"
    )


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
    if given_label:
        label, label_reason, is_sure = given_label, "given", True
    else:
        label, label_reason, is_sure = _find_label_column(features)
    feature = features[label]
    names: tuple[str, ...] | None = None
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names) if feature.names else None
    elif not _can_be_label(feature):
        raise _not_a_label(label, feature)
    reason = f"image {image!r} ({image_reason}), label {label!r} ({label_reason})"
    return Columns(image, label, names, reason, is_sure)


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


def _find_label_column(features: Mapping[str, object]) -> tuple[str, str, bool]:
    """The label column, why it is this one, and whether that is sure."""
    import datasets

    named = _named(features, LABEL_NAMES)
    usable = [name for name in named if _can_be_label(features[name])]
    whole = [name for name in usable if not _is_of(features[name], ("float",))]
    if whole:  # floats may be the targets of a regression: where nothing else is named so
        return whole[0], "by its name", True
    classes = {
        name: feature.num_classes or 0
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if len(classes) == 1:
        return next(iter(classes)), "the only ClassLabel column", True
    if classes:
        most = max(classes, key=lambda name: classes[name])
        others = ", ".join(name for name in classes if name != most)
        return most, f"the most classes, {classes[most]}; not {others}", True
    weak = [n for n in _named(features, WEAK_LABEL_NAMES) if _can_be_label(features[n])]
    for name in usable + weak:
        return name, "by its name", True
    if named:
        raise _not_a_label(named[0], features[named[0]])
    integers = [name for name, f in features.items() if _is_integer(f) and not _is_id(name)]
    if len(integers) == 1:
        return integers[0], "the only integer column that is no id", False
    if integers:
        raise ValueError(
            f"no ClassLabel column and {len(integers)} integer columns: {', '.join(integers)}. "
            f"{CHOOSE_HINT}."
        )
    raise ValueError(
        "no label column: none has the name of one (label, class, target, category, ...), and "
        f"neither ClassLabel nor integers are among {_list_columns(features)}. {CHOOSE_HINT}; text "
        "becomes classes"
    )


def _named(features: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Columns of such a name, in any case, in the order of the names."""
    lower = {column.strip().lower(): column for column in features}
    found = [lower[name] for name in names if name in lower]
    return [column for column in found if not _is_image(features[column])]


def _is_id(name: str) -> bool:
    lower = name.lower()
    return lower in NOT_LABELS or lower.endswith(("_id", "_index", "_idx"))


def _not_a_label(name: str, feature: object) -> ValueError:
    return ValueError(
        f"label column {name!r} has type {feature}: expected ClassLabel, integers or text, one "
        "class a row. Multi-label, one-hot and soft labels are not supported; another column is "
        "chosen with columns=(None, label)"
    )


def _can_be_label(feature: object) -> bool:
    import datasets

    kinds = ("int", "uint", "bool", "string", "large_string", "float", "null")
    return isinstance(feature, datasets.ClassLabel) or _is_of(feature, kinds)


def _is_of(feature: object, kinds: tuple[str, ...]) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def _is_integer(feature: object) -> bool:
    return _is_of(feature, ("int", "uint"))


def _list_columns(features: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name}: {getattr(feature, 'dtype', None) or type(feature).__name__}"
        for name, feature in features.items()
    )


def _suggest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
