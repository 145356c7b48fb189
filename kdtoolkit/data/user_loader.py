"""The user's DataLoader, rebuilt so that its batches are dicts of x, y and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from kdtoolkit.data.images import check_pixel_range
from kdtoolkit.data.items import split_item
from kdtoolkit.data.labels import check_labels

KEPT_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


class IndexedDataset(Dataset[tuple[int, Any]]):
    """The user's map-style data set; a batch carries its row numbers.

    Args:
        dataset: The user's data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: Sequence[int]) -> tuple[list[int], Any]:
        get_many = getattr(self.dataset, "__getitems__", None)
        items = get_many(rows) if get_many else [self.dataset[row] for row in rows]
        return list(rows), items

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return row, self.dataset[row]


class CountedIterable(IterableDataset[tuple[int, Any]]):
    """The user's iterable data set; each item carries a count that no other worker gives.

    Args:
        dataset: The user's data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for count, item in enumerate(self.dataset):
            yield first + count * step, item


class CollateToBatch:
    """The user's collate function, followed by a check and the conversion to x, y and index.

    Args:
        collate: The user's collate function.
        split: Name of the split, for messages.
        num_classes: Number of classes, to check labels.
        is_stream: Whether it is called with a list of (count, item), from `CountedIterable`;
            otherwise with (row numbers, items), from `IndexedDataset`.
    """

    def __init__(
        self, collate: Callable[[Any], Any], split: str, num_classes: int, is_stream: bool
    ) -> None:
        self.collate, self.split = collate, split
        self.num_classes, self.is_stream = num_classes, is_stream

    def __call__(self, fetched: Any) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            fetched: What the data set returned.

        Returns:
            x (B, 3, H, W) uint8 or float in [0, 1], y (B,) int64, index (B,) int64.

        Raises:
            ValueError: If the user's batch has another form.
        """
        if self.is_stream:
            rows, items = [pair[0] for pair in fetched], [pair[1] for pair in fetched]
        else:
            rows, items = fetched
        where = f"DataLoader of split {self.split!r}"
        images, labels, index = split_item(self.collate(items), where)
        if labels is None:
            raise ValueError(
                f"{where}: the batch has no label; labels are needed, -1 is none in a map-style "
                "data set"
            )
        x = self._check_images(images, where)
        y = self._check_label_shape(torch.as_tensor(labels), len(x), where)
        index = torch.tensor(rows) if index is None else torch.as_tensor(index)
        check_pixel_range(x, where)
        check_labels(y.numpy(), self.num_classes, self.split, index.numpy())
        return {"x": x.expand(-1, 3, -1, -1), "y": y.long(), "index": index.long()}

    @staticmethod
    def _check_images(x: Any, where: str) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{where}: images are {got}, expected a (B, 3, H, W) tensor")
        plain: Tensor = x.as_subclass(Tensor)  # type: ignore[arg-type]
        return plain

    @staticmethod
    def _check_label_shape(y: Tensor, num_images: int, where: str) -> Tensor:
        if y.shape != (num_images,) or y.is_floating_point():
            raise ValueError(
                f"{where}: labels are {tuple(y.shape)} {y.dtype}, expected ({num_images},) integers"
            )
        return y


def check_loader(loader: DataLoader[Any], split: str) -> None:
    """Check that `rebuild_loader` can make the batches of a DataLoader again.

    Args:
        loader: The user's DataLoader.
        split: Name of the split, for the message.

    Raises:
        ValueError: If it makes no batches or has its own `__iter__`.
    """
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    if unbatched or type(loader).__iter__ is not DataLoader.__iter__:
        what = "batch_size=None" if unbatched else f"its own __iter__ ({type(loader).__name__})"
        raise ValueError(f"the DataLoader of split {split!r} has {what}: pass its data set instead")


def rebuild_loader(
    loader: DataLoader[Any], split: str, num_classes: int
) -> DataLoader[dict[str, Tensor]]:
    """Make a DataLoader whose batches are dicts of x, y and index.

    It has the same data, sampler, batch size and workers.

    Args:
        loader: The user's DataLoader.
        split: Name of the split, for messages.
        num_classes: Number of classes, to check labels.

    Returns:
        The new DataLoader.
    """
    is_stream = isinstance(loader.dataset, IterableDataset)
    options: dict[str, Any] = {name: getattr(loader, name) for name in KEPT_OPTIONS}
    options["collate_fn"] = CollateToBatch(loader.collate_fn, split, num_classes, is_stream)
    if is_stream:
        stream: Any = CountedIterable(loader.dataset)
        return DataLoader(stream, loader.batch_size, drop_last=loader.drop_last, **options)
    dataset: Any = IndexedDataset(loader.dataset)
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return DataLoader(dataset, batch_sampler=batches, **options)
    size, last = batches.batch_size, batches.drop_last
    return DataLoader(dataset, size, sampler=batches.sampler, drop_last=last, **options)


def first_batch(loader: DataLoader[Any]) -> dict[str, Tensor]:
    """Make a batch of one image from a DataLoader, without starting its workers.

    Args:
        loader: The user's DataLoader of the training split.

    Returns:
        The batch, a dict of x, y and index.
    """
    is_stream = isinstance(loader.dataset, IterableDataset)
    no_limit = 2**62  # the number of classes does not matter
    to_batch = CollateToBatch(loader.collate_fn, "train", no_limit, is_stream)
    if is_stream:
        return to_batch([next(iter(CountedIterable(loader.dataset)))])
    return to_batch(IndexedDataset(loader.dataset).__getitems__([0]))
