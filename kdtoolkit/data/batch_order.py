"""The batches that a sampling makes, and the numbering of rows that an epoch draws again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdtoolkit.data.seeding import MASK_64


class BatchOrder(Protocol):
    """The batches of an epoch: lists of positions 0 .. N - 1, `batch_size` in each."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are drawn next."""


Sampling = Callable[[np.ndarray, int, int], BatchOrder]
"""(labels (N,) int64 with -1 for a row without a label, batch_size, seed) -> batches.

One that draws several batches for a step has an attribute `batches_per_step`, their number; what it
yields then has so many times `batch_size` rows.
"""


def rows_per_step(sampling: Sampling, batch_size: int) -> int:
    """Number of rows that a sampling draws for one step.

    Args:
        sampling: The sampling.
        batch_size: Rows in a batch.

    Returns:
        `batch_size`, times the number of batches that it draws for a step.
    """
    batches: int = getattr(sampling, "batches_per_step", 1)
    return batch_size * batches


class EpochBatches:
    """Batches of positions that depend on the seed and the epoch.

    Args:
        num_batches: How many batches an epoch has.
        seed: Seed of the run.
        draw: Draws the batches of one epoch with the generator that it is given.
    """

    def __init__(
        self,
        num_batches: int,
        seed: int,
        draw: Callable[[np.random.Generator], Iterator[list[int]]],
    ) -> None:
        self.num_batches, self.seed, self.draw = num_batches, seed, draw
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.draw(np.random.default_rng([self.seed & MASK_64, self.epoch]))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches are drawn next."""
        self.epoch = epoch


class RepeatBatchSampler:
    """A batch sampler that numbers the repeats of a row within an epoch.

    The second time that an epoch draws row i, the position is N + i, the third time 2 N + i, and so
    on; `split_repeats` takes it apart again, so that each repeat has an augmentation of its own.

    Args:
        sampler: The batches of an epoch; accelerate calls its `set_epoch`.
        num_rows: Number of rows N.
        batch_size: Rows in every batch.
    """

    drop_last = True

    def __init__(self, sampler: BatchOrder, num_rows: int, batch_size: int) -> None:
        self.sampler, self.num_rows, self.batch_size = sampler, num_rows, batch_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        repeats = np.zeros(self.num_rows, np.int64)
        for batch in self.sampler:
            if len(batch) != self.batch_size:
                raise ValueError(
                    f"the sampling made a batch of {len(batch)} rows, expected {self.batch_size}: "
                    "correct the sampling"
                )
            positions = []
            for row in map(int, batch):
                positions.append(row + self.num_rows * int(repeats[row]))
                repeats[row] += 1
            yield positions


def split_repeats(positions: Sequence[int], num_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the positions of a `RepeatBatchSampler` apart.

    Args:
        positions: Positions, of which i + k * num_rows is repeat k of row i.
        num_rows: Number of rows.

    Returns:
        Rows (B,) int64, and `{"draw": (B,) int64}` with the number of the repeat, 0 for the first
        draw; an empty dict where all are first draws.
    """
    found = torch.as_tensor(positions, dtype=torch.int64)
    if not len(found) or int(found.max()) < num_rows:
        return found, {}
    return found % num_rows, {"draw": found // num_rows}
