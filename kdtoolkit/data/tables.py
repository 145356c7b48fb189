"""Map-style sources, HF or torch, as one table of (image, label) rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from kdtoolkit.data.columns import ColumnNames, find_columns
from kdtoolkit.data.image_reader import ImageReader
from kdtoolkit.data.images import decode_image
from kdtoolkit.data.items import split_item
from kdtoolkit.data.label_values import NO_LABEL, plain_label
from kdtoolkit.data.labels import (
    base_datasets,
    find_class_names,
    find_labels,
    read_label_column,
)
from kdtoolkit.data.raw_labels import RawLabels, unknown_label
from kdtoolkit.data.row_error import RowError, describe_error, raised_by_user
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
        columns: (image, label) columns to use; None: find them.

    Attributes:
        labels: Class ids, (N,) int64; -1 for a row without one.
        class_names: Names of the classes, or None; of text labels their texts, sorted.
        has_text_labels: Whether the labels are text.
        columns: The columns in use.
        description: Which columns are used, in words.
        is_cacheable: Whether an image is the same each time it is read.
        is_thread_safe: Whether several threads may read at once.
        in_memory: Whether reading a row costs hardly anything.
        reader: Reads every image; None: images are given as they are decoded.

    Raises:
        ValueError: If the data set is empty, its columns cannot be found, or the values of the
            label column are no classes.
    """

    is_cacheable = is_thread_safe = True
    in_memory = False
    reader: ImageReader | None = None

    def __init__(self, dataset: datasets.Dataset, split: str, columns: ColumnNames | None) -> None:
        import datasets

        self.split = split
        if len(dataset) == 0:
            raise ValueError(f"split {split!r} holds no rows")
        found = self.columns = find_columns(dataset.features, columns)
        self.description = found.reason
        self._values = RawLabels(read_label_column(dataset, found.label, split), split)
        if found.class_names is None:
            self._values.check_repeats(f"column {found.label!r}", found.is_sure)
        self.labels: np.ndarray | None = self._values.codes()
        self.has_text_labels = self._values.is_text
        self.class_names = self._values.texts if self.has_text_labels else found.class_names
        images = dataset.select_columns([found.image]).with_format(None)
        images = images.cast_column(found.image, datasets.Image(decode=False))
        self.images = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self.images)

    def recode(self, code_of: Mapping[int | str, int]) -> None:
        """Give the labels other class ids.

        Args:
            code_of: Label as the data has it -> class id.

        Raises:
            ValueError: If a label is not among them; names the row.
        """
        self.labels = self._values.codes(code_of)

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
            K rows with an RGB PIL image each, as the reader makes it.
        """
        return [read_image(self.reader, row, self.split) for row in self.read_raw(rows)]

    def read_raw(self, rows: np.ndarray) -> Iterator[Row]:
        """Decode rows, without the reader.

        Args:
            rows: Numbers of the rows, (K,) integers.

        Yields:
            K rows with a PIL image each.
        """
        assert self.labels is not None
        values = self.images[rows.tolist()][self.columns.image].to_pylist()
        labels = self.labels[rows].tolist()
        for row, value, label in zip(rows.tolist(), values, labels, strict=True):
            yield Row(row, decode_image(value, self.split, row), label)


class TorchTable:
    """A torch data set (or an HF data set with its own transform) whose items are (x, y) or a dict.

    Args:
        dataset: The data set.
        split: Name of the split, for messages.

    Attributes:
        labels: Class ids, (N,) int64, -1 for a row without one; None when only reading the items
            tells.
        class_names: Names of the classes, or None; of text labels their texts, sorted.
        has_text_labels: Whether the labels are known to be text.
        description: What the rows are, in words.
        is_cacheable: Whether an image is known to be the same each time it is read.
        is_thread_safe: Whether several threads may read at once.
        in_memory: Whether reading a row costs hardly anything.
        reader: Reads every image; None: images are given as the data set has them.

    Raises:
        ValueError: If the data set is empty, or the labels that it states are no classes.
    """

    is_thread_safe = False
    reader: ImageReader | None = None

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        with raised_by_user(f"split {split!r}", f"len() of {type(dataset).__name__}"):
            length = len(dataset)
        if length == 0:
            raise ValueError(f"split {split!r} holds no rows")
        self.class_names = find_class_names(dataset)
        self.is_cacheable = has_fixed_items(dataset)
        self.in_memory = all(isinstance(base, TensorDataset) for base in base_datasets(dataset))
        self.description = f"items of {type(dataset).__name__}"
        self.hidden_rows: set[int] = set()  # rows whose label is hidden
        self.labels: np.ndarray | None = None
        self.has_text_labels = False
        self._values: RawLabels | None = None
        self._code_of: Mapping[int | str, int] | None = None  # label of an item -> class id
        stated = find_labels(dataset, split)
        if stated is not None:
            self._take_labels(stated)

    def __len__(self) -> int:
        return len(self.dataset)

    def _take_labels(self, values: np.ndarray) -> None:
        found = self._values = RawLabels(values, self.split)
        if self.class_names is None:
            found.check_repeats("the labels", is_sure=True)
        self.has_text_labels = found.is_text
        if not found.is_text:
            self.labels = found.codes()
            return
        if self.class_names is None:
            self.class_names = found.texts
        self.recode({name: code for code, name in enumerate(self.class_names)})

    def recode(self, code_of: Mapping[int | str, int]) -> None:
        """Give the labels other class ids.

        Args:
            code_of: Label as the data has it -> class id.

        Raises:
            ValueError: If a label is not among them; names the row. Labels that are not known yet
                are checked when they are read.
        """
        self._code_of = code_of
        if self._values is not None:
            self.labels = self._values.codes(code_of)

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

        Reads all items where the data set does not state its labels. Text becomes class ids.
        """
        if self.labels is None and self._code_of is None:
            with seeded_generators(0):
                found = [self._read_item(row)[1] for row in range(len(self))]
            self._take_labels(_as_array(found, self.split))
        elif self.labels is None:
            with seeded_generators(0):
                rows = self.read_raw(np.arange(len(self)))
                self.labels = np.array([row.label for row in rows], np.int64)
        assert self.labels is not None
        return self.labels

    def read(self, rows: np.ndarray) -> list[Row]:
        """Read rows.

        Args:
            rows: Numbers of the rows, (K,) integers.

        Returns:
            K rows with a PIL image or (C, H, W) tensor each, as the reader makes it; as the data
            set gives it where there is no reader.

        Raises:
            ValueError: If an item is not (x, y) or a dict, or a label is not one class.
        """
        return [read_image(self.reader, row, self.split) for row in self.read_raw(rows)]

    def read_raw(self, rows: np.ndarray) -> Iterator[Row]:
        """Read rows, without the reader.

        Args:
            rows: Numbers of the rows, (K,) integers.

        Returns:
            K rows with the image as the data set gives it.
        """
        return map(self._read_row, rows.tolist())

    def _read_item(self, row: int) -> tuple[Any, int | str]:
        """Image and label of a row as the data set has them."""
        where = f"split {self.split!r}, row {row}"
        image, label, _ = split_item(read_item(self.dataset, row, where), where)
        return image, plain_label(label, where)

    def _read_row(self, row: int) -> Row:
        image, label = self._read_item(row)
        if label == NO_LABEL or row in self.hidden_rows:
            return Row(row, image, NO_LABEL)
        if self._code_of is not None:
            if label not in self._code_of:
                where = f"split {self.split!r}, row {row}"
                raise unknown_label(label, self._code_of, where)
            return Row(row, image, self._code_of[label])
        if isinstance(label, str):
            raise ValueError(
                f"split {self.split!r}, row {row}: the label is the text {label!r}: leave "
                "num_classes out, so that the labels are read first and text becomes classes"
            )
        return Row(row, image, label)


def _as_array(labels: list[int | str], split: str) -> np.ndarray:
    """(N,) int64, or (N,) text as objects, None for a row without a label."""
    texts = [row for row, label in enumerate(labels) if isinstance(label, str)]
    if not texts:
        return np.array(labels, np.int64)
    others = [r for r, v in enumerate(labels) if not isinstance(v, str) and v != NO_LABEL]
    if others:
        raise ValueError(
            f"split {split!r}: the label of row {texts[0]} is text ({labels[texts[0]]!r}), that of "
            f"row {others[0]} a number ({labels[others[0]]}): use one kind"
        )
    return np.array([None if label == NO_LABEL else label for label in labels], dtype=object)


Table = HFTable | TorchTable


def read_image(reader: ImageReader | None, row: Row, split: str) -> Row:
    """Read the image of a row.

    Args:
        reader: The reader; None leaves the row as it is.
        row: The row.
        split: Name of the split, for messages.

    Returns:
        The row with the image that the reader makes.
    """
    if reader is None or reader.is_ready(row.image):
        return row
    image = reader.read(row.image, f"split {split!r}, row {row.row}")
    return Row(row.row, image, row.label)


def read_item(dataset: Any, row: int, where: str) -> Any:
    """Read an item of a map-style data set.

    Args:
        dataset: The data set.
        row: Number of the row.
        where: Start of the message of an error.

    Returns:
        The item.

    Raises:
        RowError: If the data set raises anything, with its words and the line that raised it.
    """
    try:
        return dataset[row]
    except RowError:
        raise
    except Exception as e:
        raise item_error(dataset, e, where) from e


def item_error(dataset: Any, error: Exception, where: str) -> RowError:
    """The error of a map-style data set that raises.

    Args:
        dataset: The data set.
        error: What it raised.
        where: Start of the message: the row.

    Returns:
        The error to raise, with the words of the data set's and the line that raised it.
    """
    advice = "Correct that row or the data set."
    if isinstance(error, IndexError):
        advice = f"Its length is said to be {len(dataset)}: correct __len__ if that is wrong."
    return RowError(f"{where}: {type(dataset).__name__} raised {describe_error(error)}. {advice}")


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
