"""Iterable data sets, of HF or of torch, read row by row in the main process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kdtoolkit.data.columns import ColumnNames, Columns, find_columns
from kdtoolkit.data.image_reader import ImageOptions, ImageReader
from kdtoolkit.data.images import decode_image, to_tensor
from kdtoolkit.data.items import split_item
from kdtoolkit.data.label_values import plain_label
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.row_error import enumerate_items, raised_by_user
from kdtoolkit.data.seeding import derive_seed, seeded_generators
from kdtoolkit.data.tables import Row, read_image
from kdtoolkit.data.transforms import ImageTransform

if TYPE_CHECKING:
    import datasets

SHUFFLE_BUFFER = 1000  # rows of a stream that are held to shuffle among


class StreamDataset(IterableDataset[dict[str, Tensor]]):
    """An iterable data set, row by row.

    `index` counts the rows as they come, so it is not stable over epochs.

    Args:
        source: An HF `IterableDataset` or a torch one.
        split: Name of the split; the random numbers of "train" change with the epoch.
        columns: (image, label) columns of an HF data set to use; None: find them by type.

    Attributes:
        class_names: Names of the classes, or None.
        columns: The columns in use of an HF data set; None of a torch one.
        description: Which columns are used, in words.
        reader: Reads every image; None: images are given as the stream has them.
    """

    reader: ImageReader | None = None

    def __init__(
        self,
        source: datasets.IterableDataset | IterableDataset[Any],
        split: str,
        columns: ColumnNames | None = None,
    ) -> None:
        import datasets

        self.split, self.epoch, self.train = split, 0, split == "train"
        self.transform: ImageTransform | None = None
        self.num_classes, self.seed = 0, 0
        self.image_options: ImageOptions | None = None
        self.class_names: tuple[str, ...] | None = None
        self.description = f"items of {type(source).__name__}"
        self.columns: Columns | None = None
        self._source: Any = source
        if isinstance(source, datasets.IterableDataset):
            found = self.columns = find_columns(source.features, columns)
            feature = source.features[found.label]
            if getattr(feature, "dtype", "").endswith("string"):
                raise ValueError(
                    f"split {split!r}: the label column {found.label!r} of a stream is text, whose "
                    "classes are not known before all is read: "
                    "cast it with .cast_column(name, datasets.ClassLabel(names=[...]))"
                )
            self.class_names, self.description = found.class_names, found.reason
            kept = source.select_columns([found.image, found.label])
            self._source = kept.cast_column(found.image, datasets.Image(decode=False))
        self._in_order = self._source

    @property
    def is_hf(self) -> bool:
        """Whether it is a Hugging Face stream, whose images are decoded here."""
        return self.columns is not None

    @property
    def source(self) -> Any:
        """The stream as the user gave it, of an HF stream the columns in use."""
        return self._in_order

    def configure(
        self,
        transform: ImageTransform | None,
        num_classes: int,
        seed: int,
        image_options: ImageOptions | None = None,
    ) -> None:
        """Set what is only known once all splits are open.

        Args:
            transform: Applied to each image; None: as decoded.
            num_classes: Number of classes, to check labels.
            seed: Seed of the run.
            image_options: What the user says of the images.
        """
        self.transform, self.num_classes, self.seed = transform, num_classes, seed
        self.image_options = image_options

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers are used; without effect outside of training."""
        self.epoch = epoch if self.train else 0

    def set_shuffle(self, shuffle: bool) -> None:
        """Choose whether an HF stream is shuffled.

        It is then read through a buffer, in another order each epoch. Torch streams must shuffle
        themselves.

        Args:
            shuffle: True: through a buffer of `SHUFFLE_BUFFER` rows; False: in the stream's order.
        """
        if self.columns is None:
            return
        self._source = self._in_order
        if shuffle:
            self._source = self._in_order.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def read(self) -> Iterator[Row]:
        """Read the rows without any transform; their numbers count from 0.

        Yields:
            The rows, with images as the reader makes them.
        """
        for row in self.read_raw():
            yield read_image(self.reader, row, self.split)

    def read_raw(self) -> Iterator[Row]:
        """Read the rows, without the reader.

        Yields:
            The rows, with images as the stream has them.

        Raises:
            ValueError: If a row has no label.
        """
        name = f"split {self.split!r}, row "
        for number, item in enumerate_items(self._items(), name, "the stream"):
            where = f"split {self.split!r}, row {number} of the stream"
            if self.columns is not None:
                image = decode_image(item[self.columns.image], self.split, number)
                label = item[self.columns.label]
            else:
                image, label, _ = split_item(item, where)
            if label is None:
                raise ValueError(f"{where}: no label; a stream needs one for every row")
            yield Row(number, image, self._class_id(label, where))

    @staticmethod
    def _class_id(label: object, where: str) -> int:
        found = plain_label(label, where)
        if isinstance(found, str):
            raise ValueError(
                f"{where}: the label is the text {found!r}; a stream needs whole numbers from 0"
            )
        return found

    def _items(self) -> Iterable[Any]:
        if self.columns is not None:
            self._source.set_epoch(self.epoch)
        items: Iterable[Any] = self._source
        return items

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row, image, label in self.read():
            where = f"split {self.split!r}, row {row} of the stream"
            with seeded_generators(derive_seed(self.seed, self.epoch, row)):
                with raised_by_user(where, "transforms"):
                    x = self.transform(image) if self.transform else image
                x = to_tensor(x, where, self.image_options)
            check_labels(np.array([label]), self.num_classes, self.split, [row])
            yield {"x": x, "y": torch.tensor(label), "index": torch.tensor(row)}
