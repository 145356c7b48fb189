"""Labels and class names that a data set states without being read; the check of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from kdtoolkit.data.columns import find_columns
from kdtoolkit.data.label_values import NO_LABEL, as_label_array, read_label_values

if TYPE_CHECKING:
    import datasets


def base_datasets(dataset: object) -> list[object]:
    """Find the data sets under torch's `Subset` and `ConcatDataset`.

    Args:
        dataset: A torch or HF data set.

    Returns:
        Those under it, or `dataset` itself where it is neither.
    """
    if isinstance(dataset, Subset):
        return base_datasets(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [base for part in dataset.datasets for base in base_datasets(part)]
    return [dataset]


def find_labels(dataset: Dataset[Any] | datasets.Dataset, split: str) -> np.ndarray | None:
    """Find the labels that a data set states: tensors, `targets`, `labels` or a label column.

    Args:
        dataset: A torch or HF data set.
        split: Name of the split, for messages.

    Returns:
        (N,) int64, -1 for a row whose label is None; or (N,) text as objects; None where only
        reading the items tells.

    Raises:
        ValueError: If a stated label is a float that is no whole number; names the row.
    """
    import datasets

    if isinstance(dataset, Subset):
        whole = find_labels(dataset.dataset, split)
        return None if whole is None else whole[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        found = [find_labels(part, split) for part in dataset.datasets]
        known = [labels for labels in found if labels is not None]
        if len(known) != len(found) or len({labels.dtype for labels in known}) > 1:
            return None
        return np.concatenate(known)
    if isinstance(dataset, datasets.Dataset):
        try:
            column = find_columns(dataset.features).label
        except ValueError:  # the transform makes the columns up
            return None
        labels = read_label_column(dataset, column, split)
        return None if labels.dtype == object else labels  # it may turn text into class ids
    return as_label_array(_stated_labels(dataset), len(dataset), split)  # type: ignore[arg-type]


def read_label_column(dataset: datasets.Dataset, column: str, split: str) -> np.ndarray:
    """Read the labels of an HF data set.

    Args:
        dataset: The data set.
        column: Name of the label column.
        split: Name of the split, for messages.

    Returns:
        (N,) int64, -1 where the label is null; or (N,) text as objects.

    Raises:
        ValueError: If a label is neither a whole number nor text; names the row.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    return read_label_values(values, split)


def _stated_labels(dataset: object) -> object:
    """What a torch data set holds as its labels; None if nothing."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    targets = getattr(dataset, "targets", None)
    return getattr(dataset, "labels", None) if targets is None else targets


def find_class_names(dataset: object) -> tuple[str, ...] | None:
    """Find the names of the classes.

    They are `classes` of torchvision's data sets, or those of an HF `ClassLabel`.

    Args:
        dataset: A torch or HF data set.

    Returns:
        The names in the order of the class ids, or None.
    """
    import datasets

    base = base_datasets(dataset)[0]
    if isinstance(base, datasets.Dataset):
        try:
            return find_columns(base.features).class_names
        except ValueError:
            return None
    names = getattr(base, "classes", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def check_labels(
    labels: np.ndarray,
    num_classes: int | None,
    split: str,
    rows: np.ndarray | Sequence[int] | None = None,
    *,
    allow_unlabelled: bool = False,
) -> None:
    """Check that labels are class ids.

    Args:
        labels: (N,) integers.
        num_classes: Number of classes C; a label must be in 0 .. C - 1. None: it is not known.
        split: Name of the split, for the message.
        rows: Numbers of the rows, (N,), for the message; None: 0 .. N - 1.
        allow_unlabelled: Allow -1, a row without a label.

    Raises:
        ValueError: If a label is outside; names the first such row.
    """
    lowest = NO_LABEL if allow_unlabelled else 0
    is_outside = labels < lowest
    if num_classes is not None:
        is_outside |= labels >= num_classes
    outside = np.flatnonzero(is_outside)
    if not len(outside):
        return
    first = int(outside[0])
    row = first if rows is None else int(rows[first])
    label = int(labels[first])
    more = f" ({len(outside)} such rows)" if len(outside) > 1 else ""
    if label == NO_LABEL and not allow_unlabelled:
        advice = (
            "It is a row without a label: only rows to train on may be that, in a map-style data "
            "set that states its "
            "labels before they are read (a label column, targets). Remove it."
        )
    else:
        advice = "Correct the labels, or pass the right num_classes=."
    allowed = "no class id, which is 0 or more"
    if num_classes is not None:
        allowed = f"outside 0 .. {num_classes - 1}"
    raise ValueError(f"split {split!r}, row {row}: label {label} is {allowed}{more}. {advice}")
