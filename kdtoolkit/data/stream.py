"""Iterable data sets, of HF or of torch, read row by row in the main process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from kdtoolkit.data.columns import ColumnNames, Columns, find_columns
from kdtoolkit.data.images import decode_image, to_tensor
from kdtoolkit.data.items import split_item
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.seeding import derive_seed, seeded_generators
from kdtoolkit.data.tables import Row
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
        description: Which columns are used, in words.
    """

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
        self.class_names: tuple[str, ...] | None = None
        self.description = f"items of {type(source).__name__}"
        self._columns: Columns | None = None
        self._source: Any = source
        if isinstance(source, datasets.IterableDataset):
            found = self._columns = find_columns(source.features, columns)
            self.class_names, self.description = found.class_names, found.reason
            kept = source.select_columns([found.image, found.label])
            self._source = kept.cast_column(found.image, datasets.Image(decode=False))
        self._in_order = self._source

    def configure(self, transform: ImageTransform | None, num_classes: int, seed: int) -> None:
        """Set what is only known once all splits are open.

        Args:
            transform: Applied to each image; None: as decoded.
            num_classes: Number of classes, to check labels.
            seed: Seed of the run.
        """
        self.transform, self.num_classes, self.seed = transform, num_classes, seed

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
        if self._columns is None:
            return
        self._source = self._in_order
        if shuffle:
            self._source = self._in_order.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def read(self) -> Iterator[Row]:
        """Read the rows without any transform; their numbers count from 0.

        Yields:
            The rows.

        Raises:
            ValueError: If a row has no label.
        """
        for number, item in enumerate(self._items()):
            where = f"split {self.split!r}, row {number} of the stream"
            if self._columns is not None:
                image = decode_image(item[self._columns.image], self.split, number)
                label = item[self._columns.label]
            else:
                image, label, _ = split_item(item, where)
            if label is None:
                raise ValueError(f"{where}: no label; a stream needs one for every row")
            yield Row(number, image, int(label))

    def _items(self) -> Iterable[Any]:
        if self._columns is not None:
            self._source.set_epoch(self.epoch)
        items: Iterable[Any] = self._source
        return items

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row, image, label in self.read():
            with seeded_generators(derive_seed(self.seed, self.epoch, row)):
                x = self.transform(image) if self.transform else image
                x = to_tensor(x, f"split {self.split!r}, row {row} of the stream")
            check_labels(np.array([label]), self.num_classes, self.split, [row])
            yield {"x": x, "y": torch.tensor(label), "index": torch.tensor(row)}
