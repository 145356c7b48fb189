"""From open splits and a transform plan to the splits of a `Data`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from kdtoolkit.data.cache import CachedDataset, cache_rows
from kdtoolkit.data.dataset import Split
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.open_splits import OpenSplits
from kdtoolkit.data.rows import RowDataset
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import Table
from kdtoolkit.data.transform_choice import TransformChoice
from kdtoolkit.data.transforms import ImageTransform
from kdtoolkit.data.user_loader import IndexedDataset, rebuild_loader
from kdtoolkit.utils.processors import usable_processors

MAX_AUTO_WORKERS = 8


class SplitBuilder:
    """Builds the splits.

    Args:
        splits: The open splits, with their rows.
        plan: What is done to an image.
        num_classes: Number of classes.
        seed: Seed of the run.
        num_workers: Processes that read; None: 0 for data in memory, else the processors that this
            process may use, at most 8.
    """

    def __init__(
        self,
        splits: OpenSplits,
        plan: TransformChoice,
        num_classes: int,
        seed: int,
        num_workers: int | None,
    ) -> None:
        self.splits, self.plan = splits, plan
        self.num_classes, self.seed, self.num_workers = num_classes, seed, num_workers

    def build(self) -> dict[str, Split]:
        """Build all splits.

        Returns:
            Splits by name.

        Raises:
            SizesDifferError: If decoding into memory meets an image of another size.
            ValueError: If `num_workers` does not fit a stream or a DataLoader, or a label is
                outside.
        """
        built = {}
        for name, source in self.splits.sources.items():
            if isinstance(source, DataLoader):
                built[name] = self._from_loader(name, source)
            elif isinstance(source, StreamDataset):
                built[name] = self._from_stream(name, source)
            elif self.plan.cache:
                built[name] = self._from_cache(name, source)
            else:
                built[name] = self._from_table(name, source)
        return built

    def _from_loader(self, name: str, loader: DataLoader[Any]) -> Split:
        wanted = self.num_workers if name == "train" else None
        if wanted is not None and wanted != loader.num_workers:
            raise ValueError(
                f"num_workers={wanted}, but the DataLoader has {loader.num_workers}: set it there"
            )
        rebuilt = rebuild_loader(loader, name, self.num_classes, self.splits.reader)
        dataset = rebuilt.dataset
        num_rows = len(dataset) if isinstance(dataset, IndexedDataset) else None
        return Split(
            name,
            dataset,
            num_rows=num_rows,
            stable_index=num_rows is not None,
            num_workers=rebuilt.num_workers,
            origin=self.splits.origins[name],
            user_loader=rebuilt,
        )

    def _from_stream(self, name: str, stream: StreamDataset) -> Split:
        if self.num_workers:
            raise ValueError(
                f"num_workers={self.num_workers}: a stream is read in the main process; use 'auto' "
                "or 0"
            )
        options = self.splits.reader.options
        stream.configure(self._transform(name), self.num_classes, self.seed, options)
        origin = self.splits.origins[name]
        return Split(name, stream, num_rows=None, stable_index=False, origin=origin)

    def _from_cache(self, name: str, table: Table) -> Split:
        rows, origin = self.splits.rows[name], self.splits.origins[name]
        cached = cache_rows(table, rows, self.plan.size, self.plan.resize)
        labels, is_train = cached.row_labels(), name == "train"
        check_labels(labels, self.num_classes, name, rows, allow_unlabelled=is_train)
        return Split(name, cached, len(cached), num_workers=self.num_workers or 0, origin=origin)

    def _from_table(self, name: str, table: Table) -> Split:
        rows, origin = self.splits.rows[name], self.splits.origins[name]
        transform, is_train = self._transform(name), name == "train"
        dataset = RowDataset(
            table,
            rows,
            transform,
            self.num_classes,
            self.seed,
            is_train,
            self.splits.reader.options,
        )
        workers = self.num_workers
        if workers is None:
            workers = 0 if table.in_memory else min(MAX_AUTO_WORKERS, usable_processors())
        return Split(name, dataset, len(dataset), num_workers=workers, origin=origin)

    def _transform(self, name: str) -> ImageTransform | None:
        return self.plan.for_train if name == "train" else self.plan.for_eval


def describe_storage(splits: dict[str, Split]) -> str:
    """Describe how the training data is held.

    Args:
        splits: Splits by name.

    Returns:
        In memory (with the MiB of all splits), row by row, streamed, or the user's DataLoader.
    """
    train = splits["train"]
    if isinstance(train.dataset, CachedDataset):
        datasets = [split.dataset for split in splits.values()]
        held = sum(d.images.nbytes for d in datasets if isinstance(d, CachedDataset))
        return f"uint8 images in memory, {held / 2**20:.1f} MiB"
    if isinstance(train.dataset, RowDataset):
        return f"read row by row, {train.num_workers} workers"
    return "streamed" if isinstance(train.dataset, StreamDataset) else "the user's DataLoader"
