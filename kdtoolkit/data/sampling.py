"""Which rows make a batch, where that is not left to chance: labelled ones beside others, several of one class.

A sampling is a callable `(labels (N,) int64, batch_size, seed) -> batches`, with label -1 for a row without one: an
iterable of lists of `batch_size` positions 0 .. N - 1, with `len()` and `set_epoch(epoch)`. Their order depends on
(seed, epoch) alone, so that a resumed run sees the batches that it would have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

MASK = (1 << 64) - 1


class Batches:
    """`count` batches of positions, drawn anew from (seed, epoch) by `draw(generator)`."""

    def __init__(
        self, count: int, seed: int, draw: Callable[[np.random.Generator], Iterator[list[int]]]
    ) -> None:
        self.count, self.seed, self.draw, self.epoch = count, seed, draw, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return self.draw(np.random.default_rng([self.seed & MASK, self.epoch]))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Draws:
    """Batches as DataLoader and accelerate want them. The second time that an epoch draws row i it is N + i, the third
    2 N + i, and so on: the data set takes it apart, so that each draw has an augmentation of its own."""

    drop_last = True

    def __init__(self, sampler: Any, rows: int, batch_size: int) -> None:
        self.sampler, self.rows, self.batch_size = (
            sampler,
            rows,
            batch_size,
        )  # accelerate calls sampler.set_epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        drawn = np.zeros(self.rows, np.int64)
        for batch in self.sampler:
            if len(batch) != self.batch_size:
                raise ValueError(
                    f"the sampling made a batch of {len(batch)} rows, asked for {self.batch_size}"
                )
            numbered = []
            for i in map(int, batch):
                numbered.append(i + self.rows * int(drawn[i]))
                drawn[i] += 1
            yield numbered


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A share of labelled rows in every batch: the two streams of Mean Teacher (Tarvainen & Valpola 2017).

    labelled  share of a batch, 0 to 1, rounded to at least one row of either kind

    A pass is one over the rows without a label; labelled ones are drawn again and again, in shuffled passes. They are
    spread over the batch: of equal parts for several processes each has its share, to one row. Where all rows are
    labelled it is plain shuffling. What does not fill the last batch is left out.
    """

    labelled: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.labelled, bool) or not 0 < self.labelled < 1:
            raise ValueError(
                f"Mixed(labelled={self.labelled!r}): the share of labelled rows in a batch, between 0 and 1"
            )

    def __call__(self, labels: np.ndarray, batch_size: int, seed: int) -> Batches:
        known, others = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        if not len(known):
            raise ValueError(
                f"none of {len(labels)} training rows has a label, Mixed puts some into every batch"
            )
        if not len(others):
            return _shuffled(known, batch_size, seed)
        if batch_size < 2:
            raise ValueError(
                f"batch_size {batch_size} has no room for rows with and without a label: 2 or more"
            )
        share = min(max(round(batch_size * self.labelled), 1), batch_size - 1)
        count = _count(len(others), batch_size - share, "rows without a label")
        places = (
            np.arange(1, batch_size + 1) * share // batch_size
            > np.arange(batch_size) * share // batch_size
        )

        def draw(generator: np.random.Generator) -> Iterator[list[int]]:
            second = generator.permutation(others)
            passes = -(-count * share // len(known))
            first = np.concatenate([generator.permutation(known) for _ in range(passes)])
            for n in range(count):
                batch = np.empty(batch_size, np.int64)
                batch[places] = first[n * share : (n + 1) * share]
                batch[~places] = second[n * (batch_size - share) : (n + 1) * (batch_size - share)]
                yield batch.tolist()

        return Batches(count, seed, draw)


@dataclasses.dataclass(frozen=True)
class SameClass:
    """Anchors, each followed by other rows of its class, as BAKE (Ge et al. 2021) needs them.

    partners  rows of the same class behind each anchor; a class with fewer others repeats them, a row that is alone in
              its class is its own partner

    In a pass every row is an anchor once, so it covers 1 + partners times the rows. What does not fill the last batch
    is left out. Parts of a batch for several processes keep groups whole where 1 + partners divides the part's size.
    """

    partners: int = 3

    def __post_init__(self) -> None:
        if (
            isinstance(self.partners, bool)
            or not isinstance(self.partners, int)
            or self.partners < 0
        ):
            raise ValueError(
                f"SameClass(partners={self.partners!r}): rows of the same class, a whole number from 0"
            )

    def __call__(self, labels: np.ndarray, batch_size: int, seed: int) -> Batches:
        group = 1 + self.partners
        if batch_size % group:
            raise ValueError(
                f"batch_size {batch_size} does not divide by {group}: an anchor and {self.partners} partners of its "
                "class; take another batch_size or another number of partners"
            )
        if (labels < 0).any():
            raise ValueError(
                f"{int((labels < 0).sum())} training rows have no label, SameClass needs that of every row"
            )
        anchors = batch_size // group
        count = _count(len(labels), anchors, "anchors")
        order = np.argsort(labels, kind="stable")  # rows class by class
        first, size = _runs(labels[order])
        place = np.empty(len(labels), np.int64)  # of a row in `order`
        place[order] = np.arange(len(labels))

        def others(i: int, generator: np.random.Generator) -> list[int]:
            start, many = first[place[i]], size[place[i]] - 1
            if many == 0:
                return [i] * self.partners
            chosen = generator.choice(many, self.partners, replace=many < self.partners) + start
            return order[chosen + (chosen >= place[i])].tolist()

        def draw(generator: np.random.Generator) -> Iterator[list[int]]:
            rows = generator.permutation(len(labels))[: count * anchors].tolist()
            for n in range(count):
                here = rows[n * anchors : (n + 1) * anchors]
                yield [row for i in here for row in [i, *others(i, generator)]]

        return Batches(count, seed, draw)


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each place in sorted labels: where its class begins, and how many it has."""
    _, inverse, counts = np.unique(ordered, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts)[inverse], counts[inverse]


def _shuffled(rows: np.ndarray, batch_size: int, seed: int) -> Batches:
    count = _count(len(rows), batch_size, "rows")

    def draw(generator: np.random.Generator) -> Iterator[list[int]]:
        order = generator.permutation(rows)
        for n in range(count):
            yield order[n * batch_size : (n + 1) * batch_size].tolist()

    return Batches(count, seed, draw)


def _count(rows: int, each: int, what: str) -> int:
    if rows < each:
        raise ValueError(
            f"{rows} {what} do not fill one batch, which takes {each}: use a smaller batch_size"
        )
    return rows // each
