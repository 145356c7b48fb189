"""Samplings: which rows make a batch.

For methods that need labelled rows beside others, or several rows of one class. A sampling is
called with the labels, the batch size and the seed and returns the batches of an epoch as lists of
row positions. The order depends on (seed, epoch) alone, so a resumed run gets the batches that it
would have got.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from kdtoolkit.data.batch_order import EpochBatches
from kdtoolkit.utils.validation import check_number, check_whole_number


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A fixed share of labelled rows in every batch.

    As Mean Teacher needs it (Tarvainen & Valpola 2017, arXiv 1703.01780). One epoch is one pass
    over the rows without a label; labelled rows are repeated in shuffled passes. Labelled rows are
    spread over the batch: of equal parts for several processes each has its share, to one row.
    Where all rows are labelled it is plain shuffling. Rows that do not fill the last batch are left
    out.

    Attributes:
        labelled: Share of labelled rows in a batch, between 0 and 1; rounded to at least one row of
            either kind.

    Raises:
        ValueError: If `labelled` is not between 0 and 1, or, when called, if the rows do not fill a
            batch.
    """

    labelled: float = 0.5

    def __post_init__(self) -> None:
        meaning = "share of labelled rows in a batch"
        check_number("labelled of Mixed", self.labelled, above=0, below=1, meaning=meaning)

    def __call__(self, labels: np.ndarray, batch_size: int, seed: int) -> EpochBatches:
        """Draw the batches.

        Args:
            labels: Class ids, (N,) int64; -1 for a row without a label.
            batch_size: Rows in a batch.
            seed: Seed of the run.

        Returns:
            The batches of an epoch.
        """
        labelled_rows, other_rows = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        if not len(labelled_rows):
            raise ValueError(
                f"none of {len(labels)} training rows has a label, Mixed puts some into every "
                "batch: "
                "pass labelled rows"
            )
        if not len(other_rows):
            return _shuffled_batches(labelled_rows, batch_size, seed)
        if batch_size < 2:
            raise ValueError(
                f"batch_size is {batch_size}; rows with and without a label need 2 or more"
            )
        num_labelled = min(max(round(batch_size * self.labelled), 1), batch_size - 1)
        num_other = batch_size - num_labelled
        num_batches = _num_full_batches(len(other_rows), num_other, "rows without a label")
        is_labelled = _spread_evenly(num_labelled, batch_size)

        def draw(generator: np.random.Generator) -> Iterator[list[int]]:
            others = generator.permutation(other_rows).tolist()
            num_passes = -(-num_batches * num_labelled // len(labelled_rows))  # rounded up
            passes = [generator.permutation(labelled_rows) for _ in range(num_passes)]
            next_labelled, next_other = iter(np.concatenate(passes).tolist()), iter(others)
            for _ in range(num_batches):
                yield [next(next_labelled if known else next_other) for known in is_labelled]

        return EpochBatches(num_batches, seed, draw)


@dataclasses.dataclass(frozen=True)
class OwnBatches:
    """A batch of its own for each of several networks.

    Every network runs through all rows in an order of its own, another one each epoch. What is
    drawn for a step holds the batches of all networks: place i belongs to network i modulo
    `networks`, so that equal parts for several processes hold equal shares of every network. Rows
    that do not fill the last batch of a network are left out.

    Attributes:
        networks: Number of networks, from 1.

    Raises:
        ValueError: If `networks` is not a whole number from 1, or, when called, if the rows do not
            fill a batch.
    """

    networks: int

    def __post_init__(self) -> None:
        check_whole_number("networks of OwnBatches", self.networks)

    @property
    def batches_per_step(self) -> int:
        """Batches that are drawn for one step."""
        return self.networks

    def __call__(self, labels: np.ndarray, batch_size: int, seed: int) -> EpochBatches:
        """Draw the batches.

        Args:
            labels: Class ids, (N,) int64; only their number is read.
            batch_size: Rows in the batch of one network.
            seed: Seed of the run.

        Returns:
            The batches of an epoch, `networks` times `batch_size` rows in each.
        """
        num_batches = _num_full_batches(len(labels), batch_size, "rows")

        def draw(generator: np.random.Generator) -> Iterator[list[int]]:
            orders = np.stack([generator.permutation(len(labels)) for _ in range(self.networks)], 1)
            for rows in _chunks(orders.ravel().tolist(), batch_size * self.networks, num_batches):
                yield list(rows)

        return EpochBatches(num_batches, seed, draw)


@dataclasses.dataclass(frozen=True)
class SameClass:
    """Anchors, each followed by other rows of its class, as BAKE needs them (Ge et al. 2021).

    In an epoch every row is an anchor once, so an epoch covers 1 + partners times the rows. Rows
    that do not fill the last batch are left out. Parts of a batch for several processes keep groups
    whole where 1 + partners divides the size of a part.

    Attributes:
        partners: Rows of the same class behind each anchor, from 0. A class with fewer others
            repeats them; a row that is alone in its class is its own partner.

    Raises:
        ValueError: If `partners` is not a whole number from 0, or, when called, if `batch_size`
            does not divide by 1 + partners, a row has no label, or the rows do not fill a batch.
    """

    partners: int = 3

    def __post_init__(self) -> None:
        meaning = "rows of the same class behind each anchor"
        check_whole_number("partners of SameClass", self.partners, minimum=0, meaning=meaning)

    def __call__(self, labels: np.ndarray, batch_size: int, seed: int) -> EpochBatches:
        """Draw the batches.

        Args:
            labels: Class ids, (N,) int64.
            batch_size: Rows in a batch, anchors and partners together.
            seed: Seed of the run.

        Returns:
            The batches of an epoch.
        """
        self._check(labels, batch_size)
        num_anchors = batch_size // (1 + self.partners)
        num_batches = _num_full_batches(len(labels), num_anchors, "anchors")
        classes = _RowsByClass(labels)

        def draw(generator: np.random.Generator) -> Iterator[list[int]]:
            order = generator.permutation(len(labels)).tolist()
            for anchors in _chunks(order, num_anchors, num_batches):
                batch = []
                for anchor in anchors:
                    batch += [anchor, *classes.draw_others(anchor, self.partners, generator)]
                yield batch

        return EpochBatches(num_batches, seed, draw)

    def _check(self, labels: np.ndarray, batch_size: int) -> None:
        group = 1 + self.partners
        if batch_size % group:
            raise ValueError(
                f"batch_size {batch_size} does not divide by {group}: an anchor and "
                f"{self.partners} partners of its class; take another batch_size or another number "
                "of partners"
            )
        if (labels < 0).any():
            raise ValueError(
                f"{int((labels < 0).sum())} training rows have no label, SameClass needs that of "
                "every row: "
                "remove them"
            )


class _RowsByClass:
    """Rows sorted by class, and where the class of each row begins in that order."""

    def __init__(self, labels: np.ndarray) -> None:
        self.order = np.argsort(labels, kind="stable")
        self.place = np.empty(len(labels), np.int64)  # of a row in `order`
        self.place[self.order] = np.arange(len(labels))
        _, inverse, counts = np.unique(labels[self.order], return_inverse=True, return_counts=True)
        self.class_start = (np.cumsum(counts) - counts)[inverse]  # (N,) by place in `order`
        self.class_size = counts[inverse]

    def draw_others(self, row: int, count: int, generator: np.random.Generator) -> list[int]:
        """Draw other rows of the row's class.

        Rows are repeated where there are fewer than `count`; a row that is alone is its own.
        """
        place = self.place[row]
        num_others = self.class_size[place] - 1
        if num_others == 0:
            return [row] * count
        drawn = generator.choice(num_others, count, replace=bool(num_others < count))
        places = drawn + self.class_start[place]
        skip_self = places >= place
        return [int(other) for other in self.order[places + skip_self]]


def _spread_evenly(count: int, size: int) -> list[bool]:
    """`size` flags of which `count` are set, at even distances."""
    return [(place + 1) * count // size > place * count // size for place in range(size)]


def _shuffled_batches(rows: np.ndarray, batch_size: int, seed: int) -> EpochBatches:
    num_batches = _num_full_batches(len(rows), batch_size, "rows")

    def draw(generator: np.random.Generator) -> Iterator[list[int]]:
        yield from _chunks(generator.permutation(rows).tolist(), batch_size, num_batches)

    return EpochBatches(num_batches, seed, draw)


def _chunks(rows: list[int], size: int, count: int) -> Iterable[list[int]]:
    """The first `count` pieces of `size` rows each."""
    for start in range(0, count * size, size):
        yield rows[start : start + size]


def _num_full_batches(num_rows: int, per_batch: int, what: str) -> int:
    if num_rows < per_batch:
        raise ValueError(
            f"{num_rows} {what} do not fill one batch, which takes {per_batch}: use a smaller "
            "batch_size"
        )
    return num_rows // per_batch
