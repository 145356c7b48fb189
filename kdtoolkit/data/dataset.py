"""Data and Split: what the engine asks of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.sampling import Draws
from kdtoolkit.data.workers import Stream
from kdtoolkit.types import Batch


@dataclasses.dataclass(eq=False)
class Split:
    """One split. len: rows, None where unknown. stable_index: a sample has the same index in each epoch.

    origin: where the rows came from, for people. own_loader: the user's DataLoader; it keeps its batch size and order.
    """

    name: str
    dataset: Dataset
    len: int | None
    stable_index: bool = True
    num_workers: int = 0
    origin: str = ""
    own_loader: DataLoader | None = None

    def __len__(self) -> int:
        if self.len is None:
            raise TypeError(f"the length of split {self.name!r} is not known")
        return self.len

    def __bool__(self) -> bool:
        return True

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        sampling: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> DataLoader:
        """Batches of dict(x (B, 3, H, W) uint8 or float in [0, 1], y (B,) int64, index (B,) int64), on the CPU.

        sampling  chooses the rows of every batch from their labels and `seed` (see `data.sampling`), in place of
                  `shuffle` and `drop_last`: its batches are full. A row that an epoch draws again has draw (B,) > 0
        """
        if sampling is not None:
            return self._sampled(batch_size, sampling, seed)
        if self.own_loader is not None:
            return self.own_loader
        pin = torch.cuda.is_available()
        if isinstance(self.dataset, Stream):
            self.dataset.shuffle(shuffle)
            return DataLoader(self.dataset, batch_size, drop_last=drop_last, pin_memory=pin)
        return DataLoader(
            self.dataset,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=pin,
        )

    def _sampled(self, batch_size: int, sampling: Callable[..., Any], seed: int) -> DataLoader:
        row_labels = getattr(self.dataset, "row_labels", None)
        if self.own_loader is not None or row_labels is None:
            what = "a DataLoader of your own" if self.own_loader is not None else "a stream"
            raise ValueError(
                f"split {self.name!r} is {what}, this method chooses the rows of a batch by their labels ({sampling}): "
                "pass a map-style data set"
            )
        labels = row_labels()
        batches = Draws(sampling(labels, batch_size, seed), len(labels), batch_size)
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=torch.cuda.is_available(),
        )


def as_is(batch: Any) -> Any:
    """The data set's __getitems__ has already made the batch."""
    return batch


@dataclasses.dataclass(eq=False)
class Data:
    """Splits, classes and augmentation. Nothing here is normalised: each model normalises its own input.

    unlabelled: training rows without a label; theirs is -1. Rows of the other splits all have one.
    """

    name: str
    num_classes: int
    class_names: list[str] | None
    image_size: tuple[int, int]
    train: Split
    val: Split | None
    test: Split | None
    augment: BatchAugment | None = None
    seed: int = 0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    unlabelled: int = 0

    def finish(
        self, batch: Batch | dict[str, Tensor], *, epoch: int, train: bool, views: int = 1
    ) -> Batch:
        """A loader's batch, already on the training device -> x float in [0, 1], augmented when `train`.

        views > 1 with `train` adds batch["views"] (B, views, 3, H, W), independent augmentations; the first is x.
        """
        x, index = batch["x"], batch["index"]
        draw = batch.get("draw")
        at = index if draw is None else index + (draw << 32)  # type: ignore[operator]
        if train and views > 1:
            if self.augment is None:
                has = self.notes.get("augmentation", "none")
                raise ValueError(
                    f"{views} views need a batched augmentation, the data has {has!r}: "
                    "pass transforms='crop-flip' or transforms=BatchAugment(...)"
                )
            draws = [self.augment(x, at, seed=self.seed, epoch=epoch, view=v) for v in range(views)]
            stacked = as_float(torch.stack(draws, 1))
            return Batch(x=stacked[:, 0], y=batch["y"], index=index, views=stacked)
        if train and self.augment is not None:
            x = self.augment(x, at, seed=self.seed, epoch=epoch)
        return Batch(x=as_float(x), y=batch["y"], index=index)

    def set_epoch(self, epoch: int) -> None:
        """Tell data sets that draw per sample in workers or shuffle a stream; call before iterating a loader."""
        set_epoch = getattr(self.train.dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)

    def describe(self) -> dict[str, Any]:
        """Plain values for config.yaml: where everything came from and what is done to it."""
        splits = {s.name: s for s in (self.train, self.val, self.test) if s is not None}
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "image_size": list(self.image_size),
            "rows": {name: split.len for name, split in splits.items()},
            "origin": {name: split.origin for name, split in splits.items()},
            "workers": self.train.num_workers,
            **self.notes,
        }


def as_float(x: Tensor) -> Tensor:
    """uint8 0 .. 255 -> float32 0 .. 1; floats stay as they are."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x
