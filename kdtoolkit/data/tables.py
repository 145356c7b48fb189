"""Map-style sources, HF or torch, as one table of (image, label) rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from kdtoolkit.data.columns import ColumnNames, find_columns
from kdtoolkit.data.images import decode_image
from kdtoolkit.data.items import split_item
from kdtoolkit.data.labels import (
    NO_LABEL,
    base_datasets,
    find_class_names,
    find_labels,
    read_label_column,
)
from kdtoolkit.data.seeding import seeded_generators

if TYPE_CHECKING:
    import datasets


class Row(NamedTuple):
    """One row of a table or a stream, before any transform of ours.

    Attributes:
        row: Number of the row.
        image: PIL image, array or (C, H, W) tensor.
        label: Class id, -1 for a row without a label.
    """

    row: int
    image: Any
    label: int


class HFTable:
    """An HF data set with an image and a label column.

    Images are decoded here, so that an error can name the row.

    Args:
        dataset: The data set.
        split: Name of the split, for messages.
        columns: (image, label) columns to use; None: find them by type.

    Attributes:
        labels: Class ids, (N,) int64; -1 for a row without one.
        class_names: Names of the classes, or None.
        description: Which columns are used, in words.
        is_cacheable: Whether an image is the same each time it is read.
        is_thread_safe: Whether several threads may read at once.
        in_memory: Whether reading a row costs hardly anything.

    Raises:
        ValueError: If the data set is empty or its columns cannot be found.
    """

    is_cacheable = is_thread_safe = True
    in_memory = False

    def __init__(self, dataset: datasets.Dataset, split: str, columns: ColumnNames | None) -> None:
        import datasets

        self.split = split
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} holds no rows")
        found = find_columns(dataset.features, columns)
        self.image_column, self.class_names = found.image, found.class_names
        self.description = found.reason
        self.labels: np.ndarray | None = read_label_column(dataset, found.label)
        images = dataset.select_columns([found.image]).with_format(None)
        images = images.cast_column(found.image, datasets.Image(decode=False))
        self.images = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self.images)

    def hide_labels(self, rows: np.ndarray) -> None:
        """Replace the labels of some rows by -1; the user's data set keeps its own.

        Args:
            rows: Numbers of the rows, (K,) integers; the labels must be known.
        """
        assert self.labels is not None
        self.labels = self.labels.copy()
        self.labels[rows] = NO_LABEL

    def read_labels(self) -> np.ndarray:
        """Return the class ids, (N,) int64, -1 for a row without one."""
        assert self.labels is not None
        return self.labels

    def read(self, rows: np.ndarray) -> list[Row]:
        """Read and decode rows.

        Args:
            rows: Numbers of the rows, (K,) integers.

        Returns:
            K rows with an RGB PIL image each.
        """
        assert self.labels is not None
        values = self.images[rows.tolist()][self.image_column].to_pylist()
        labels = self.labels[rows].tolist()
        return [
            Row(row, decode_image(value, self.split, row), label)
            for row, value, label in zip(rows.tolist(), values, labels, strict=True)
        ]


class TorchTable:
    """A torch data set (or an HF data set with its own transform) whose items are (x, y) or a dict.

    Args:
        dataset: The data set.
        split: Name of the split, for messages.

    Attributes:
        labels: Class ids, (N,) int64, -1 for a row without one; None when only reading the items
            tells.
        class_names: Names of the classes, or None.
        description: What the rows are, in words.
        is_cacheable: Whether an image is known to be the same each time it is read.
        is_thread_safe: Whether several threads may read at once.
        in_memory: Whether reading a row costs hardly anything.

    Raises:
        ValueError: If the data set is empty.
    """

    is_thread_safe = False

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} holds no rows")
        self.labels = find_labels(dataset)
        self.class_names = find_class_names(dataset)
        self.is_cacheable = has_fixed_items(dataset)
        self.in_memory = all(isinstance(base, TensorDataset) for base in base_datasets(dataset))
        self.description = f"items of {type(dataset).__name__}"
        self.hidden_rows: set[int] = set()  # rows whose label is hidden

    def __len__(self) -> int:
        return len(self.dataset)

    def hide_labels(self, rows: np.ndarray) -> None:
        """Replace the labels of some rows by -1; the user's data set keeps its own.

        Args:
            rows: Numbers of the rows, (K,) integers; the labels must be known.
        """
        assert self.labels is not None
        self.labels = self.labels.copy()
        self.labels[rows] = NO_LABEL
        self.hidden_rows |= set(rows.tolist())

    def read_labels(self) -> np.ndarray:
        """Return the class ids, (N,) int64, -1 for a row without one.

        Reads all items where the data set does not state its labels.
        """
        if self.labels is None:
            with seeded_generators(0):
                rows = self.read(np.arange(len(self)))
            self.labels = np.array([row.label for row in rows], np.int64)
        return self.labels

    def read(self, rows: np.ndarray) -> list[Row]:
        """Read rows.

        Args:
            rows: Numbers of the rows, (K,) integers.

        Returns:
            K rows with a PIL image, array or (C, H, W) tensor each.

        Raises:
            ValueError: If an item is not (x, y) or a dict, or a label is not one integer.
        """
        return [self._read_row(row) for row in rows.tolist()]

    def _read_row(self, row: int) -> Row:
        where = f"split {self.split!r}, row {row}"
        item = split_item(self.dataset[row], where)
        if item.label is None or row in self.hidden_rows:
            return Row(row, item.image, NO_LABEL)
        if np.ndim(item.label) != 0 or isinstance(item.label, str):
            raise ValueError(f"{where}: label {item.label!r} is not one integer class id")
        return Row(row, item.image, int(item.label))


Table = HFTable | TorchTable


def has_fixed_items(dataset: Dataset[Any]) -> bool:
    """Whether items are known to be the same each time they are read.

    They are for tensors and for torchvision's data sets without transforms.

    Args:
        dataset: A torch data set.

    Returns:
        Whether all data sets under it are of these kinds.
    """
    from torchvision.datasets import VisionDataset

    def is_fixed(base: object) -> bool:
        if isinstance(base, VisionDataset):
            return base.transform is None and base.transforms is None
        return isinstance(base, TensorDataset)

    return all(map(is_fixed, base_datasets(dataset)))
