"""Data that is not one tensor: rows read one by one in workers, streams, and loaders the user has built."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from kdtoolkit.data.augment import key
from kdtoolkit.data.cache import apart
from kdtoolkit.data.columns import check_labels, find_columns
from kdtoolkit.data.tables import (
    Table,
    TorchTable,
    check_range,
    decode_image,
    parts,
    to_pil,
    to_tensor,
)

Transform = Callable[[Any], Any]
SHUFFLE_BUFFER = 1000  # rows of a stream held to shuffle among


def train_transform(size: tuple[int, int]) -> Transform:
    """Random resized crop to (H, W) and horizontal flip; uint8."""
    return v2.Compose(
        [to_pil, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def eval_transform(size: tuple[int, int]) -> Transform:
    """Shorter side to 256 / 224 of the longer of (H, W), then the centre; uint8."""
    return v2.Compose(
        [to_pil, v2.Resize(round(max(size) * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()]
    )


def resize_transform(size: tuple[int, int]) -> Transform:
    """All of the image to (H, W); uint8 or float as it was."""
    return v2.Compose([to_image, v2.Resize(size, antialias=True)])


def to_image(image: Any) -> Tensor:
    return to_tensor(image, "image")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU, Python's and NumPy's global generators start from `seed` inside and are as before afterwards."""
    saved = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


def all_labels(table: Table) -> np.ndarray:
    """(N,) int64; a table that does not know its labels is read once."""
    if table.labels is None:
        assert isinstance(table, TorchTable)
        with seeded(0):
            table.labels = table.read_labels()
    return table.labels


class Rows(Dataset):
    """Rows of a table, read and transformed one by one; what is random in that depends on (seed, epoch, row) alone, and
    on the number of the draw where an epoch draws a row again.

    Rows to train on may be without a label (-1) where the table knows all labels beforehand.
    """

    def __init__(
        self,
        table: Table,
        rows: np.ndarray,
        transform: Transform | None,
        num_classes: int,
        seed: int,
        train: bool,
    ) -> None:
        self.table, self.rows, self.transform, self.num_classes = (
            table,
            rows,
            transform,
            num_classes,
        )
        self.seed, self.train, self.epoch = seed, train, 0
        self.unlabelled = train and table.labels is not None

    def __len__(self) -> int:
        return len(self.rows)

    def row_labels(self) -> np.ndarray:
        """(N,) int64, -1 for a row without one."""
        labels = all_labels(self.table)[self.rows]
        check_labels(
            labels, self.num_classes, self.table.split, self.rows, unlabelled=self.unlabelled
        )
        return labels

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.train else 0

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([i]).items()}

    def __getitems__(self, ids: Sequence[int]) -> dict[str, Tensor]:
        at, draw = apart(ids, len(self))
        rows = self.rows[at.numpy()]
        draws = draw["draw"].tolist() if draw else [0] * len(rows)
        images, labels = zip(*map(self._read, rows, draws), strict=True)
        odd = next((k for k, image in enumerate(images) if image.shape != images[0].shape), None)
        if odd is not None:
            raise ValueError(
                f"split {self.table.split!r}: row {rows[odd]} is {tuple(images[odd].shape)}, row {rows[0]} is "
                f"{tuple(images[0].shape)}; a batch needs equal sizes: end the transforms with a resize or a crop"
            )
        y, index = torch.tensor(labels, dtype=torch.int64), torch.from_numpy(rows.astype(np.int64))
        return {"x": torch.stack(images), "y": y, "index": index, **draw}

    def _read(self, row: int, draw: int) -> tuple[Tensor, int]:
        where = f"split {self.table.split!r}, row {row}"
        with seeded(key(self.seed, self.epoch, int(row), *([draw] if draw else []))):
            _, image, label = self.table.read(np.array([row]))[0]
            image = to_tensor(self.transform(image) if self.transform else image, where)
        split, number = self.table.split, np.array([row])
        check_labels(np.array([label]), self.num_classes, split, number, unlabelled=self.unlabelled)
        return image, label


class Stream(IterableDataset):
    """An HF or torch iterable data set, row by row; `index` counts the rows as they come, and is not stable."""

    def __init__(
        self, source: Any, split: str, columns: tuple[str | None, str | None] | None = None
    ) -> None:
        self.split, self.epoch, self.train = split, 0, split == "train"
        self.transform: Transform | None = None
        self.num_classes, self.seed = 0, 0
        self.class_names: tuple[str, ...] | None = None
        self.source, self.image, self.label, self.note = (
            source,
            "",
            "",
            f"items of {type(source).__name__}",
        )
        if isinstance(source, datasets.IterableDataset):
            found = find_columns(source.features, columns)
            self.image, self.label, self.class_names, self.note = (
                found.image, found.label, found.class_names, found.note
            )  # fmt: skip
            kept = source.select_columns([found.image, found.label])
            self.source = kept.cast_column(found.image, datasets.Image(decode=False))
        self.plain = self.source

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.train else 0

    def shuffle(self, on: bool) -> None:
        """Read through a shuffle buffer, anew each epoch, or in order (torch streams must shuffle themselves)."""
        if self.image:
            self.source = (
                self.plain.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER) if on else self.plain
            )

    def raw(self) -> Iterator[tuple[int, Any, int]]:
        """(count, image, label) without transform."""
        if self.image:
            self.source.set_epoch(self.epoch)
        for row, item in enumerate(self.source):
            where = f"split {self.split!r}, row {row} of the stream"
            if self.image:
                image, label = decode_image(item[self.image], self.split, row), item[self.label]
            else:
                image, label, _ = parts(item, where)
            if label is None:
                raise ValueError(f"{where}: no label")
            yield row, image, int(label)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for row, image, label in self.raw():
            with seeded(key(self.seed, self.epoch, row)):
                x = self.transform(image) if self.transform else image
                x = to_tensor(x, f"split {self.split!r}, row {row} of the stream")
            check_labels(np.array([label]), self.num_classes, self.split, np.array([row]))
            yield {"x": x, "y": torch.tensor(label), "index": torch.tensor(row)}


class Numbered(Dataset):
    """The user's map-style data set; a batch carries its row numbers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, ids: Sequence[int]) -> tuple[list[int], Any]:
        many = getattr(self.dataset, "__getitems__", None)
        return list(ids), many(ids) if many else [self.dataset[i] for i in ids]

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.dataset[i]


class Counted(IterableDataset):
    """The user's iterable data set; items carry a count, distinct over workers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for count, item in enumerate(self.dataset):
            yield first + count * step, item


class ToBatch:
    """The user's collate function, followed by the turn into dict(x, y, index)."""

    def __init__(self, collate: Callable, split: str, num_classes: int, paired: bool) -> None:
        self.collate, self.split, self.num_classes, self.paired = (
            collate,
            split,
            num_classes,
            paired,
        )

    def __call__(self, fetched: Any) -> dict[str, Tensor]:
        if self.paired:  # from Counted: a list of (count, item)
            ids, items = [pair[0] for pair in fetched], [pair[1] for pair in fetched]
        else:
            ids, items = fetched
        where = f"DataLoader of split {self.split!r}"
        x, y, index = parts(self.collate(items), where)
        if y is None:
            raise ValueError(
                f"{where}: the batch has no label; labels are needed, -1 is none in a map-style data set"
            )
        index = torch.tensor(ids) if index is None else torch.as_tensor(index)
        y = torch.as_tensor(y)
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{where}: images are {got}, expected a (B, 3, H, W) tensor")
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"{where}: labels are {tuple(y.shape)} {y.dtype}, expected ({len(x)},) integers"
            )
        x = x.as_subclass(Tensor)
        check_range(x, where)
        check_labels(y.numpy(), self.num_classes, self.split, index.numpy())
        return {"x": x.expand(-1, 3, -1, -1), "y": y.long(), "index": index.long()}


def check_loader(loader: DataLoader, split: str) -> None:
    """Raise ValueError for a loader whose batches `rebuild` could not make again."""
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    if unbatched or type(loader).__iter__ is not DataLoader.__iter__:
        what = "batch_size=None" if unbatched else f"its own __iter__ ({type(loader).__name__})"
        raise ValueError(f"the DataLoader of split {split!r} has {what}: pass its data set instead")


def rebuild(loader: DataLoader, split: str, num_classes: int) -> DataLoader:
    """The user's loader with the same data, sampler, batch size and workers, yielding dict(x, y, index)."""
    stream = isinstance(loader.dataset, IterableDataset)
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
            "prefetch_factor", "persistent_workers",
        )
    }  # fmt: skip
    options["collate_fn"] = ToBatch(loader.collate_fn, split, num_classes, stream)
    if stream:
        return DataLoader(
            Counted(loader.dataset), loader.batch_size, drop_last=loader.drop_last, **options
        )
    data = Numbered(loader.dataset)
    if type(loader.batch_sampler) is BatchSampler:
        sampler, size = loader.batch_sampler.sampler, loader.batch_sampler.batch_size
        return DataLoader(
            data, size, sampler=sampler, drop_last=loader.batch_sampler.drop_last, **options
        )
    return DataLoader(data, batch_sampler=loader.batch_sampler, **options)
