"""The user's DataLoader, rebuilt so that its batches are dicts of x, y and index."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from kdtoolkit.data.image_reader import ImageReader
from kdtoolkit.data.items import Item, split_item
from kdtoolkit.data.label_values import ONE_CLASS, plain_label
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.row_error import enumerate_items, raised_by_user, without_traceback
from kdtoolkit.data.tables import item_error
from kdtoolkit.utils.signals import WorkerStart

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
        if get_many is None:
            return list(rows), self._read(rows)
        with raised_by_user(f"rows {list(rows)} of the DataLoader's data set", "__getitems__"):
            return list(rows), get_many(rows)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        return row, self._read([row])[0]

    def _read(self, rows: Sequence[int]) -> list[Any]:
        items: list[Any] = []
        try:
            for row in rows:
                items.append(self.dataset[row])  # noqa: PERF401 (their number names the bad row)
        except Exception as e:
            where = f"row {rows[len(items)]} of the DataLoader's data set"
            raise item_error(self.dataset, e, where) from e
        return items


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
        items = enumerate_items(self.dataset, "item ", "the DataLoader's data set")
        for count, item in items:
            yield first + count * step, item


class CollateToBatch:
    """The user's collate function, followed by a check and the conversion to x, y and index.

    Args:
        collate: The user's collate function.
        split: Name of the split, for messages.
        num_classes: Number of classes, to check labels.
        is_stream: Whether it is called with a list of (count, item), from `CountedIterable`;
            otherwise with (row numbers, items), from `IndexedDataset`.
        reader: Reads the images.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        split: str,
        num_classes: int,
        is_stream: bool,
        reader: ImageReader,
    ) -> None:
        self.collate, self.split, self.reader = collate, split, reader
        self.num_classes, self.is_stream = num_classes, is_stream

    def __call__(self, fetched: Any) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            fetched: What the data set returned.

        Returns:
            x (B, 3, H, W) uint8 or float in [0, 1], y (B,) int64, index (B,) int64.

        Raises:
            RowError: If the user's batch has another form.
        """
        with without_traceback():
            return self._make_batch(fetched)

    def _make_batch(self, fetched: Any) -> dict[str, Tensor]:
        if self.is_stream:
            rows, items = [pair[0] for pair in fetched], [pair[1] for pair in fetched]
        else:
            rows, items = fetched
        where = f"DataLoader of split {self.split!r}"
        images, labels, index = self._take_apart(items, where)
        index = _row_numbers(index, rows)
        x = self._read_images(images, index, where)
        y = labels_as_tensor(labels, len(x), where)
        check_labels(y.numpy(), self.num_classes, self.split, index.numpy())
        return {"x": x, "y": y.long(), "index": index.long()}

    def raw_images(self, fetched: Any) -> Any:
        """What the user's batch holds as images, without any check.

        Args:
            fetched: As in a call.

        Returns:
            The images.
        """
        items = [pair[1] for pair in fetched] if self.is_stream else fetched[1]
        return self._take_apart(items, f"DataLoader of split {self.split!r}").image

    def _take_apart(self, items: Any, where: str) -> Item:
        with raised_by_user(where, "collate_fn"):
            batch = self.collate(items)
        item = split_item(batch, where)
        if item.label is None:
            raise ValueError(
                f"{where}: the batch has no label; labels are needed, -1 is none in a map-style "
                "data set"
            )
        return item

    def _read_images(self, x: Any, index: Tensor, where: str) -> Tensor:
        x = images_as_tensor(x, where)
        try:
            return self.reader.read_batch(x, where)
        except ValueError:
            for row, image in zip(index.tolist(), x, strict=True):  # name the first bad row
                self.reader.read_batch(image[None], f"{where}, row {row}")
            raise


def _row_numbers(index: Any, rows: Sequence[int]) -> Tensor:
    """Row numbers that the user's batch holds, (B,) int64.

    Where its third part is anything else, such as paths of files, they are those of the data set.
    """
    numbers = torch.tensor(rows)
    try:
        given = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        return numbers
    is_whole = not given.is_floating_point() and not given.is_complex()
    return given if is_whole and given.shape == numbers.shape else numbers


def labels_as_tensor(labels: Any, num_images: int, where: str) -> Tensor:
    """The labels of a user's batch as class ids.

    Args:
        labels: Tensor, array or list of whole numbers.
        num_images: Number B of images.
        where: Start of the message of an error.

    Returns:
        (B,) int64.

    Raises:
        ValueError: If they are anything else, such as text or soft labels.
    """
    if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
        text = next(label for label in labels if isinstance(label, str))
        raise ValueError(
            f"{where}: the labels are text ({text!r}, ...), a batch needs whole numbers from 0: "
            "turn text into numbers in the data set, or pass the data set itself in place of the "
            "DataLoader, whose text labels become classes"
        )
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(
            f"{where}: the labels are {type(labels).__name__}, expected ({num_images},) integers"
        ) from e
    if y.shape != (num_images,):
        advice = "remove the last dimension" if y.shape == (num_images, 1) else ONE_CLASS
        raise ValueError(
            f"{where}: labels are {tuple(y.shape)} {y.dtype}, expected ({num_images},) integers: "
            f"{advice}"
        )
    if y.is_floating_point():
        numbers = y.detach().double().cpu().numpy()
        wrong = np.flatnonzero(~(numbers == np.floor(numbers)) | ~np.isfinite(numbers))
        for at in wrong:
            plain_label(float(numbers[at]), f"{where}, image {at} of a batch")
    return y.long()


def check_loader(loader: DataLoader[Any], split: str) -> None:
    """Check that `rebuild_loader` can make the batches of a DataLoader again.

    Args:
        loader: The user's DataLoader.
        split: Name of the split, for the message.

    Raises:
        ValueError: If it makes no batches, has its own `__iter__` or holds no rows.
    """
    _check_not_empty(loader, split)
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    if unbatched or type(loader).__iter__ is not DataLoader.__iter__:
        what = "batch_size=None" if unbatched else f"its own __iter__ ({type(loader).__name__})"
        raise ValueError(f"the DataLoader of split {split!r} has {what}: pass its data set instead")


def _check_not_empty(loader: DataLoader[Any], split: str) -> None:
    if isinstance(loader.dataset, IterableDataset):
        return
    where = f"the DataLoader of split {split!r}"
    rows = len(loader.dataset)  # type: ignore[arg-type]
    if rows == 0:
        raise ValueError(f"{where} is empty: its data set holds no rows; pass one that does")
    if loader.batch_sampler is not None and len(loader) == 0:
        raise ValueError(
            f"{where} makes no batch: its data set holds {rows} rows, batch_size is "
            f"{loader.batch_size} and drop_last {loader.drop_last}; pass a smaller batch size, "
            "drop_last=False or a sampler that draws rows"
        )


def rebuild_loader(
    loader: DataLoader[Any], split: str, num_classes: int, reader: ImageReader
) -> DataLoader[dict[str, Tensor]]:
    """Make a DataLoader whose batches are dicts of x, y and index.

    It has the same data, sampler, batch size and workers.

    Args:
        loader: The user's DataLoader.
        split: Name of the split, for messages.
        num_classes: Number of classes, to check labels.
        reader: Reads the images.

    Returns:
        The new DataLoader.
    """
    is_stream = isinstance(loader.dataset, IterableDataset)
    options: dict[str, Any] = {name: getattr(loader, name) for name in KEPT_OPTIONS}
    options["worker_init_fn"] = WorkerStart(loader.worker_init_fn)
    options["collate_fn"] = CollateToBatch(loader.collate_fn, split, num_classes, is_stream, reader)
    if is_stream:
        stream: Any = CountedIterable(loader.dataset)
        return DataLoader(stream, loader.batch_size, drop_last=loader.drop_last, **options)
    dataset: Any = IndexedDataset(loader.dataset)
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return DataLoader(dataset, batch_sampler=batches, **options)
    size, last = batches.batch_size, batches.drop_last
    return DataLoader(dataset, size, sampler=batches.sampler, drop_last=last, **options)


def images_as_tensor(x: Any, where: str) -> Tensor:
    """The images of a user's batch as a tensor.

    Args:
        x: Tensor or array (B, C, H, W), (B, H, W, C) or (B, H, W).
        where: Start of the message of an error.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(x, np.ndarray) and x.dtype != object:
        x = torch.from_numpy(x)
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{where}: images are {got}, expected a (B, 3, H, W) tensor")
    return x


def first_images(loader: DataLoader[Any], split: str, count: int) -> list[Tensor]:
    """Read some images of a DataLoader, each in a batch of its own, without starting its workers.

    Args:
        loader: The user's DataLoader.
        split: Name of the split, for messages.
        count: How many images; of a stream the first, else spread over the rows.

    Returns:
        Batches of one image, as the user's collate function makes them.
    """
    is_stream = isinstance(loader.dataset, IterableDataset)
    to_batch = CollateToBatch(loader.collate_fn, split, 0, is_stream, ImageReader())
    fetched: Iterable[Any]
    if is_stream:
        items = itertools.islice(iter(CountedIterable(loader.dataset)), count)
        fetched = ([item] for item in items)
    else:
        dataset = IndexedDataset(loader.dataset)
        rows = spread_rows(len(dataset), count)
        fetched = (dataset.__getitems__([row]) for row in rows.tolist())
    where = f"DataLoader of split {split!r}"
    return [images_as_tensor(to_batch.raw_images(one), where) for one in fetched]


def spread_rows(num_rows: int, count: int) -> np.ndarray:
    """Choose rows that are spread over a split.

    Args:
        num_rows: Number of rows of the split.
        count: How many to choose.

    Returns:
        Numbers of at most `count` rows, the first and the last among them.
    """
    return np.linspace(0, num_rows - 1, min(count, num_rows)).astype(int)
