"""Map-style data that is read and transformed row by row in workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdtoolkit.data.batch_order import split_repeats
from kdtoolkit.data.image_reader import ImageOptions
from kdtoolkit.data.images import to_tensor
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.row_error import raised_by_user, without_traceback
from kdtoolkit.data.seeding import derive_seed, seeded_generators
from kdtoolkit.data.tables import Table
from kdtoolkit.data.transforms import ImageTransform


class RowDataset(Dataset[dict[str, Tensor]]):
    """Rows of a table, read and transformed one by one.

    An item or a batch is a dict of x, y and index, on the CPU.

    What is random in reading and transforming a row depends on (seed, epoch, row) alone, and on the
    number of the repeat where an epoch draws a row again. Rows to train on may be without a label
    (-1) where the table states all labels beforehand.

    Args:
        table: Where the rows are read from.
        rows: Numbers of the rows of this split, (N,) integers.
        transform: Applied to each image; None: as decoded.
        num_classes: Number of classes, to check labels.
        seed: Seed of the run.
        train: Whether this is the training split: its random numbers change with the epoch.
        image_options: What the user says of the images.
    """

    def __init__(
        self,
        table: Table,
        rows: np.ndarray,
        transform: ImageTransform | None,
        num_classes: int,
        seed: int,
        train: bool,
        image_options: ImageOptions | None = None,
    ) -> None:
        self.table, self.rows, self.transform = table, rows, transform
        self.num_classes, self.seed, self.train = num_classes, seed, train
        self.image_options = image_options
        self.epoch = 0
        self.allow_unlabelled = train and table.labels is not None

    def __len__(self) -> int:
        return len(self.rows)

    def row_labels(self) -> np.ndarray:
        """Return the class ids, (N,) int64, -1 for a row without one.

        Reads all items where the table does not state them.
        """
        labels: np.ndarray = self.table.read_labels()[self.rows]
        self._check_labels(labels, self.rows)
        return labels

    def num_unlabelled(self) -> int:
        """Return how many rows have no label.

        Where labels are only known by reading, a row without one is an error when it is read.
        """
        return int((self.row_labels() < 0).sum()) if self.allow_unlabelled else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers are used; without effect outside of training."""
        self.epoch = epoch if self.train else 0

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        with without_traceback():
            return self._read_batch(positions)

    def _read_batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        at, draw = split_repeats(positions, len(self))
        rows = self.rows[at.numpy()]
        repeats = draw["draw"].tolist() if draw else [0] * len(rows)
        images, labels = zip(*map(self._read_row, rows.tolist(), repeats), strict=True)
        self._check_sizes(images, rows)
        y, index = torch.tensor(labels, dtype=torch.int64), torch.from_numpy(rows.astype(np.int64))
        return {"x": torch.stack(images), "y": y, "index": index, **draw}

    def _read_row(self, row: int, repeat: int) -> tuple[Tensor, int]:
        where = f"split {self.table.split!r}, row {row}"
        number = np.array([row])
        parts = (self.seed, self.epoch, row, repeat) if repeat else (self.seed, self.epoch, row)
        with seeded_generators(derive_seed(*parts)):
            found = self.table.read(number)[0]
            image = found.image
            if self.transform is not None:
                with raised_by_user(where, "transforms"):
                    image = self.transform(image)
            x = to_tensor(image, where, self.image_options)
        self._check_labels(np.array([found.label]), number)
        return x, found.label

    def _check_labels(self, labels: np.ndarray, rows: np.ndarray) -> None:
        check_labels(
            labels,
            self.num_classes,
            self.table.split,
            rows,
            allow_unlabelled=self.allow_unlabelled,
        )

    def _check_sizes(self, images: Sequence[Tensor], rows: np.ndarray) -> None:
        first = images[0].shape
        for row, image in zip(rows, images, strict=True):
            if image.shape != first:
                raise ValueError(
                    f"split {self.table.split!r}: row {row} is {tuple(image.shape)}, row {rows[0]} "
                    "is "
                    f"{tuple(first)}; a batch needs equal sizes: end the transforms with a resize "
                    "or a crop"
                )
