"""The classes of a run: their names and order, the same in all splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from torch.utils.data import DataLoader

from kdtoolkit.data.label_values import NO_LABEL
from kdtoolkit.data.labels import find_class_names, find_labels
from kdtoolkit.data.open_splits import SplitSource
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import HFTable, Table, TorchTable
from kdtoolkit.utils.validation import check_whole_number

MAX_NAMES = 8  # that a note lists


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of all splits.

    Attributes:
        names: Their names in the order of the class ids; None where there are none.
        count: Their number.
        notes: Sentences about how labels became class ids.
    """

    names: tuple[str, ...] | None
    count: int
    notes: tuple[str, ...] = ()


def settle_classes(sources: Mapping[str, SplitSource], num_classes: int | None) -> Classes:
    """Find the classes of all splits, and give their labels the same class ids.

    Text becomes classes in the order of `sorted_names`. Whole numbers without names are class ids
    where they begin at 0 and leave out at most half of the numbers below the highest; others are
    numbered from 0 in their order, unless `num_classes` is given.

    Args:
        sources: The splits; labels of tables are changed.
        num_classes: What the user gave, or None.

    Returns:
        The classes.

    Raises:
        ValueError: If splits disagree on the classes, the number is another or cannot be found, or
            labels are no classes.
    """
    if num_classes is not None:
        check_whole_number("num_classes", num_classes)
    train = sources["train"]
    labels = None
    if _class_names(train) is None and num_classes is None:
        labels = _training_labels(train)  # of items that are text, their names are known now
    names = _class_names(train)
    if names is not None:
        _match_names(sources, names)
        if num_classes not in (None, len(names)):
            raise ValueError(
                f"num_classes={num_classes}, but the data has {len(names)} classes: leave "
                "num_classes out"
            )
        if len(names) == 1 and num_classes is None:
            raise ValueError(
                f"the training data has a single class, {names[0]!r}, and nothing to learn: check "
                "the folder or the label column, or pass num_classes=1 if that is meant"
            )
        return Classes(names, len(names))
    _refuse_text(sources)
    if num_classes is not None:
        return Classes(None, num_classes)
    if labels is None:
        raise ValueError(
            "the number of classes cannot be seen from the training data: pass num_classes="
        )
    return _number_classes(sources, labels)


def _class_names(source: SplitSource) -> tuple[str, ...] | None:
    if isinstance(source, DataLoader):
        return find_class_names(source.dataset)
    return source.class_names


def _training_labels(train: SplitSource) -> np.ndarray | None:
    if isinstance(train, DataLoader):
        labels = find_labels(train.dataset, "train")
        if labels is not None and labels.dtype == object:
            raise ValueError(
                f"the labels of the DataLoader's data set are text ({labels[0]!r}, ...), a batch "
                "needs whole numbers: pass the data set itself, whose text becomes classes, or "
                "turn text into numbers in it"
            )
        return labels
    return None if isinstance(train, StreamDataset) else train.read_labels()


# --------------------------------------------------------------------------- classes with names
def _match_names(sources: Mapping[str, SplitSource], names: tuple[str, ...]) -> None:
    """Check that all splits have the classes of train; recode those whose labels are text."""
    train = sources["train"]
    by_text = isinstance(train, HFTable | TorchTable) and train.has_text_labels
    code_of: dict[int | str, int] = {name: code for code, name in enumerate(names)}
    for split, source in sources.items():
        if split == "train":
            continue
        other = _class_names(source)
        if isinstance(source, HFTable | TorchTable) and source.has_text_labels:
            source.recode(code_of)
        elif by_text:
            _recode_by_name(split, source, other, names)
        elif other and other != names:
            raise _names_differ(split, other, names)


def _recode_by_name(
    split: str, source: SplitSource, other: tuple[str, ...] | None, names: tuple[str, ...]
) -> None:
    """The training labels are text: other labels must have names, or stand for them."""
    if other == names:
        return
    code_of: dict[int | str, int] = {name: code for code, name in enumerate(names)}
    if not isinstance(source, HFTable | TorchTable):
        if other:
            raise _names_differ(split, other, names)
        return
    if other:
        unknown = [name for name in other if name not in code_of]
        if unknown:
            raise _names_differ(split, other, names)
        source.recode({code: code_of[name] for code, name in enumerate(other)})
    elif source.labels is None:
        source.recode(code_of)  # checked when an item is read
    else:
        raise ValueError(
            f"the labels of train are text ({names[0]!r}, ...), those of {split} whole numbers: "
            "use one kind"
        )


def _names_differ(split: str, other: tuple[str, ...], names: tuple[str, ...]) -> ValueError:
    shorter = min(len(names), len(other))
    differs = next((k for k in range(shorter) if names[k] != other[k]), shorter)
    ours, theirs = (list(n[differs : differs + 1]) or "nothing" for n in (names, other))
    return ValueError(
        f"train has {len(names)} classes, {split} {len(other)}; class {differs} is {ours} in train "
        f"and {theirs} in {split}: the same label must mean the same class"
    )


# --------------------------------------------------------------------- whole numbers without names
def _refuse_text(sources: Mapping[str, SplitSource]) -> None:
    for split, source in sources.items():
        if isinstance(source, HFTable | TorchTable) and source.has_text_labels:
            assert source.class_names
            raise ValueError(
                f"the labels of train are whole numbers, those of {split} text "
                f"({source.class_names[0]!r}, ...): use one kind"
            )


def _number_classes(sources: Mapping[str, SplitSource], labels: np.ndarray) -> Classes:
    """Classes of training labels that are whole numbers."""
    values = np.unique(labels[labels >= 0]).tolist()
    if not values or labels.min() < NO_LABEL:
        return Classes(None, max(values, default=-1) + 1)  # refused where rows are chosen
    if len(values) == 1:
        raise _single_class(values[0], bool((labels == NO_LABEL).any()))
    if values[0] == 0 and 2 * len(values) >= values[-1] + 1:
        return Classes(None, values[-1] + 1)
    shown = _list(values)
    for split, source in sources.items():
        if not isinstance(source, HFTable | TorchTable):
            raise ValueError(
                f"the training labels are {shown}, which are no class ids 0 .. C - 1, and those of "
                f"a DataLoader or a stream ({split}) cannot be numbered again: number them from 0 "
                f"in the data, or pass num_classes={values[-1] + 1} to keep them"
            )
        source.recode({value: code for code, value in enumerate(values)})
    note = (
        f"labels {shown} are the classes 0 .. {len(values) - 1}, in this order "
        f"(num_classes={values[-1] + 1} would keep the labels as they are)"
    )
    return Classes(tuple(map(str, values)), len(values), (note,))


def _single_class(value: int, has_unlabelled: bool) -> ValueError:
    if has_unlabelled:
        return ValueError(
            f"the training labels are -1 and {value}: -1 is the label of a row without one, so "
            "that a single class is left. Write two classes as 0 and 1; if the rows of -1 are "
            f"unlabelled, pass num_classes={value + 1}"
        )
    return ValueError(
        f"every training label is {value}: there is a single class, and nothing to learn; check "
        f"the label column, or pass num_classes={value + 1} at least"
    )


def _list(values: list[int]) -> str:
    if len(values) <= MAX_NAMES:
        return ", ".join(map(str, values))
    return ", ".join(map(str, values[: MAX_NAMES - 1])) + f", ..., {values[-1]}"


# ------------------------------------------------------------------------------ rows of a class
def describe_empty_classes(
    tables: Mapping[str, Table], rows: Mapping[str, np.ndarray], classes: Classes
) -> list[str]:
    """Say which classes have no rows.

    Args:
        tables: The tables, by split; labels of one that are not known are not read.
        rows: Numbers of the rows of each split, (N,) integers.
        classes: The classes.

    Returns:
        A sentence for each split that lacks some.
    """
    notes = []
    for split, table in tables.items():
        if table.labels is None:
            continue
        labels = table.labels[rows[split]]
        counts = np.bincount(labels[labels >= 0], minlength=classes.count)
        empty = np.flatnonzero(counts == 0).tolist()
        if empty:
            names = [classes.names[k] if classes.names else str(k) for k in empty[:MAX_NAMES]]
            more = f" and {len(empty) - MAX_NAMES} more" if len(empty) > MAX_NAMES else ""
            notes.append(
                f"{len(empty)} of {classes.count} classes have no rows in {split}: "
                f"{', '.join(names)}{more}"
            )
    return notes
