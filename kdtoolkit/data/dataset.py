"""Data and Split: the splits of a data set with their loaders, and the preparation of batches."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.batch_order import RepeatBatchSampler, Sampling, rows_per_step
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.transforms import EvalTransform
from kdtoolkit.types import Batch
from kdtoolkit.utils.signals import WorkerStart

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Split:
    """The rows of one split: training, validation or test.

    Attributes:
        name: `"train"`, `"val"` or `"test"`.
        dataset: Torch data set whose batches are dicts of x, y and index.
        num_rows: Number of rows; None where it is not known, as for a stream.
        stable_index: Whether a sample has the same `index` in each epoch.
        num_workers: Processes that read; 0: the main process.
        origin: Where the rows came from, in words.
        user_loader: The user's DataLoader, rebuilt to yield such dicts; it keeps its batch size and
            order. None where the user gave a data set.
    """

    name: str
    dataset: Dataset[Any]
    num_rows: int | None
    stable_index: bool = True
    num_workers: int = 0
    origin: str = ""
    user_loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        if self.num_rows is None:
            raise TypeError(f"the length of split {self.name!r} is not known")
        return self.num_rows

    def __bool__(self) -> bool:
        return True

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> DataLoader[Any]:
        """Make a DataLoader over the split; a user's own DataLoader is returned as it is.

        Its batches are dicts on the CPU: x (B, 3, H, W) uint8 or float in [0, 1], y (B,) int64
        class ids (-1: no label) and index (B,) int64. `Data.prepare_batch` turns them into what a
        method gets. With `sampling`, a row that an epoch draws again has draw (B,) > 0.

        Args:
            batch_size: Rows in a batch.
            shuffle: Another order each epoch; a stream is shuffled within a buffer.
            drop_last: Leave out a last batch that is not full.
            sampling: Chooses the rows of every batch from their labels and `seed`, in place of
                `shuffle` and `drop_last` (see `kdtoolkit.data.sampling`); all its batches are full.
            seed: Seed of the sampling.

        Returns:
            The DataLoader.

        Raises:
            ValueError: If a sampling is given and the split is a stream or the user's DataLoader.
        """
        if sampling is not None:
            return self._sampled_loader(batch_size, sampling, seed)
        if self.user_loader is not None:
            return self.user_loader
        pin = torch.cuda.is_available()
        if isinstance(self.dataset, StreamDataset):
            self.dataset.set_shuffle(shuffle)
            return DataLoader(self.dataset, batch_size, drop_last=drop_last, pin_memory=pin)
        return DataLoader(
            self.dataset,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=_already_collated,
            worker_init_fn=WorkerStart(),
            pin_memory=pin,
        )

    def _sampled_loader(self, batch_size: int, sampling: Sampling, seed: int) -> DataLoader[Any]:
        row_labels = getattr(self.dataset, "row_labels", None)
        if self.user_loader is not None or row_labels is None:
            what = "a DataLoader of your own" if self.user_loader is not None else "a stream"
            raise ValueError(
                f"split {self.name!r} is {what}, this method chooses the rows of every "
                f"batch ({sampling}): pass a map-style data set"
            )
        labels = row_labels()
        order = sampling(labels, batch_size, seed)
        rows = rows_per_step(sampling, batch_size)
        batches: Any = RepeatBatchSampler(order, len(labels), rows)
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_already_collated,
            worker_init_fn=WorkerStart(),
            pin_memory=torch.cuda.is_available(),
        )


def _already_collated(batch: T) -> T:
    """The collate function of data sets whose `__getitems__` returns a batch."""
    return batch


@dataclasses.dataclass(eq=False)
class Data:
    """A data set as a run uses it: splits, classes and augmentation. Made by `load`.

    Nothing here is normalised: each model normalises its own input.

    Attributes:
        name: Name of the data set.
        num_classes: Number of classes.
        class_names: Names in the order of the class ids, or None.
        image_size: (H, W) of a batch in pixels.
        train: Rows to train on.
        val: Rows that choose the best epoch, or None.
        test: Rows of the final figures, or None.
        augment: Augmentation of training batches on the device, or None.
        seed: Seed of the augmentation.
        details: What was chosen and why (validation, augmentation, columns, storage), for
            `describe`.
        num_unlabelled: Training rows without a label; theirs is -1. Rows of the other splits all
            have one.
        notes: Sentences about rows and classes: splits and images that are left out, where test
            rows come from, classes without rows, labels that were numbered again.
        channels: Channels of an image.
        eval_terms: What is done to an image for evaluation, in timm's terms; None: not known.

    Example:
        >>> from kdtoolkit import data
        >>> digits = data.load("digits")
        >>> batch = next(iter(digits.train.loader(64, shuffle=True)))
        >>> batch = digits.prepare_batch(batch, epoch=0, train=True)
        >>> batch["x"].shape
        torch.Size([64, 3, 16, 16])
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
    details: dict[str, int | str] = dataclasses.field(default_factory=dict)
    num_unlabelled: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    channels: int = 3
    eval_terms: EvalTransform | None = None

    def prepare_batch(
        self, batch: Batch | dict[str, Tensor], *, epoch: int, train: bool, views: int = 1
    ) -> Batch:
        """Turn a loader's batch into what a method gets: augmented when `train`, float in [0, 1].

        Args:
            batch: Batch of a `Split.loader`, moved to the training device.
            epoch: Number of the epoch; the augmentation depends on it.
            train: Whether to augment.
            views: Number V of augmentations of each image, independent of each other.

        Returns:
            x (B, 3, H, W) float in [0, 1], y (B,) and index (B,) int64; with V > 1 and `train` also
            views (B, V, 3, H, W), the first of which is x.

        Raises:
            ValueError: If several views are wanted and there is no batched augmentation.
        """
        x, y, index = batch["x"], batch["y"], batch["index"]
        draw = batch.get("draw")
        sample = index
        if isinstance(draw, Tensor):  # a repeat of a row has an augmentation of its own
            sample = index + (draw << 32)
        if train and views > 1:
            if self.augment is None:
                has = self.details.get("augmentation", "none")
                raise ValueError(
                    f"{views} views need a batched augmentation, the data has {has!r}: "
                    "pass transforms='crop-flip' or transforms=BatchAugment(...)"
                )
            draws = [
                self.augment(x, sample, seed=self.seed, epoch=epoch, view=view)
                for view in range(views)
            ]
            stacked = _to_float(torch.stack(draws, 1))
            return Batch(x=stacked[:, 0], y=y, index=index, views=stacked)
        if train and self.augment is not None:
            x = self.augment(x, sample, seed=self.seed, epoch=epoch)
        return Batch(x=_to_float(x), y=y, index=index)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch for data that draws random numbers in workers or shuffles a stream.

        Args:
            epoch: Number of the epoch; call this before a loader is iterated.
        """
        set_epoch = getattr(self.train.dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)

    def describe(self) -> dict[str, Any]:
        """Return plain values for `config.yaml`: the rows' origins and what is done to them."""
        splits = [split for split in (self.train, self.val, self.test) if split is not None]
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "classes": self.class_names,
            "image_size": list(self.image_size),
            "rows": {split.name: split.num_rows for split in splits},
            "origin": {split.name: split.origin for split in splits},
            "workers": self.train.num_workers,
            **self.details,
        }


def _to_float(x: Tensor) -> Tensor:
    """Map uint8 0 .. 255 to float32 0 .. 1; floats stay as they are."""
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x
