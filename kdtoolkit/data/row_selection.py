"""Which training rows are held out for testing and validation, left out, or lose their label."""

from __future__ import annotations

import numpy as np
from torch.utils.data import DataLoader

from kdtoolkit.data.open_splits import OpenSplits
from kdtoolkit.data.seeding import derive_seed
from kdtoolkit.data.splits import (
    TEST_SHARE,
    Validation,
    draw_stratified,
    num_validation_rows,
)
from kdtoolkit.data.tables import HFTable, Table, TorchTable
from kdtoolkit.utils.validation import check_whole_number

TRAIN_LIMIT_SEED, HIDDEN_LABELS_SEED = 1, 2  # numbers of the draws after that for validation


class TrainRows:
    """The training rows that are left while others are held out.

    Args:
        table: What they are read from.

    Attributes:
        rows: Their numbers, (N,) integers, sorted.
        how: How rows are drawn, in words.
    """

    def __init__(self, table: Table) -> None:
        self.table, self.rows = table, np.arange(len(table))
        self.how = "at random" if table.labels is None else "by class"

    def labelled(self) -> np.ndarray:
        """Return the rows that have a label, (K,) integers."""
        if self.table.labels is None:
            return self.rows
        labelled: np.ndarray = self.rows[self.table.labels[self.rows] >= 0]
        return labelled

    def draw(self, size: int, among: np.ndarray, seed: int) -> np.ndarray:
        """Draw rows, each class in proportion.

        Args:
            size: How many.
            among: Rows to draw from.
            seed: Seed of the draw.

        Returns:
            (size,) integers, sorted.
        """
        labels = None if self.table.labels is None else self.table.labels[among]
        _, drawn = draw_stratified(len(among), size, labels, seed)
        rows: np.ndarray = among[drawn]
        return rows

    def hold_out(self, size: int, seed: int) -> np.ndarray:
        """Draw labelled rows and remove them from the training rows.

        Args:
            size: How many.
            seed: Seed of the draw.

        Returns:
            (size,) integers, sorted.
        """
        drawn = self.draw(size, self.labelled(), seed)
        self.rows = np.setdiff1d(self.rows, drawn, assume_unique=True)
        return drawn


def select_rows(
    splits: OpenSplits,
    validation: Validation,
    seed: int,
    train_limit: int | None,
    test_on_validation: bool = False,
) -> None:
    """Choose the rows of every split that is read from a table.

    Splits that are held out of the training data are added to `splits`.

    Args:
        splits: The splits; their `sources`, `origins` and `rows` are changed.
        validation: From `check_validation`.
        seed: Seed of the draws for validation and for the limit; the test rows are the same for any
            seed.
        train_limit: Train on this many rows only; None: on all that are left.
        test_on_validation: The source's validation split is what papers report on.

    Raises:
        ValueError: If there are too few rows, or rows of a stream or a DataLoader would have to be
            drawn.
    """
    if train_limit is not None:
        check_whole_number("train_limit", train_limit, meaning="rows to train on")
    _place_validation(splits, validation, test_on_validation)
    splits.rows = {name: np.arange(len(table)) for name, table in splits.tables().items()}
    train = splits.train
    if not isinstance(train, HFTable | TorchTable):
        _refuse_drawing(splits, validation, train_limit)
        return
    left = TrainRows(train)
    if not len(left.labelled()):
        raise ValueError(
            f"none of {len(train)} training rows has a label: there is nothing to learn from; pass "
            "labelled rows"
        )
    if "test" not in splits.sources and "val" not in splits.sources:
        _hold_out_test(splits, left)
    wants_validation = validation not in ("none", "test")
    if wants_validation and ("val" not in splits.sources or validation != "auto"):
        size = num_validation_rows(validation, len(left.labelled()))
        splits.rows["val"], splits.sources["val"] = left.hold_out(size, seed), train
        splits.origins["val"] = f"held out of train: {size} rows, drawn {left.how} from seed {seed}"
    if train_limit is not None and train_limit < len(left.rows):
        left.rows = left.draw(train_limit, left.rows, derive_seed(seed, TRAIN_LIMIT_SEED))
        splits.origins["train"] += (
            f", limited to {train_limit} rows drawn {left.how} from seed {seed}"
        )
    splits.rows["train"] = left.rows


def _place_validation(splits: OpenSplits, validation: Validation, is_test: bool) -> None:
    """Say what the source's validation split is used for: it chooses the epoch, tests, or neither.

    Args:
        splits: The splits; the validation split may become the test split or go.
        validation: From `check_validation`.
        is_test: The source's validation split is what papers report on.
    """
    if "val" not in splits.sources:
        return
    own, has_test = splits.origins["val"], "test" in splits.sources
    chooses = validation == "auto" and not (is_test and not has_test)
    if chooses:
        if not has_test:
            splits.notes.append(
                f"there is no test split: {own} chooses the epoch, and the final figures are those "
                "of the same rows; pass eval_data, or validation=0.1 to choose on training rows"
            )
        return
    if has_test:
        splits.notes.append(f"{own} is left out: validation={validation!r}")
        splits.remove("val")
        return
    source = splits.sources["test"] = splits.sources.pop("val")
    splits.origins["test"] = f"{own}, as there is no test split"
    splits.notes.append(f"there is no test split: {own} is the test set")
    if not isinstance(source, DataLoader):
        source.split = "test"


def _hold_out_test(splits: OpenSplits, left: TrainRows) -> None:
    size = round(TEST_SHARE * len(left.labelled()))
    if size < 1:
        raise ValueError(
            f"{len(left.table)} training rows and no test data: too few to hold some out; pass "
            "eval_data"
        )
    splits.rows["test"], splits.sources["test"] = left.hold_out(size, seed=0), left.table
    splits.origins["test"] = (
        f"held out of train, as no labelled test split: {size} rows, drawn {left.how}, the same "
        "for all seeds"
    )
    splits.notes.append(
        f"there is no test split: {size:,} training rows, drawn {left.how}, are the test set"
    )


def _refuse_drawing(splits: OpenSplits, validation: Validation, train_limit: int | None) -> None:
    """The training data is a stream or a DataLoader: its rows cannot be drawn."""
    if train_limit is not None or not isinstance(validation, str):
        what = f"validation={validation}" if train_limit is None else f"train_limit={train_limit}"
        raise ValueError(
            f"{what}: rows of a stream or a DataLoader cannot be drawn; pass a map-style data set"
        )
    if validation == "auto" and "val" not in splits.sources:
        splits.no_validation = "rows of a stream or a DataLoader cannot be held out"


def hide_labels(splits: OpenSplits, labelled: int | float, seed: int) -> None:
    """Hide the labels of all training rows but some, drawn by class.

    Args:
        splits: The splits, with their rows.
        labelled: How many keep their label (an int), or which share of those that have one (a
            float).
        seed: Seed of the draw.

    Raises:
        ValueError: If that leaves a class without a label, is more than there are, or the training
            data is a stream or a DataLoader.
    """
    train = splits.train
    if not isinstance(train, HFTable | TorchTable):
        raise ValueError(
            f"labelled={labelled}: rows of a stream or a DataLoader cannot be drawn; pass a "
            "map-style data set"
        )
    train_rows, all_labels = splits.rows["train"], train.read_labels()
    candidates = train_rows[all_labels[train_rows] >= 0]
    labels = all_labels[candidates]
    size = labelled if isinstance(labelled, int) else round(labelled * len(candidates))
    num_classes = len(np.unique(labels))
    if not num_classes <= size <= len(candidates):
        raise ValueError(
            f"labelled={labelled} keeps the labels of {size} rows: at least one for each of the "
            f"{num_classes} classes "
            f"and at most the {len(candidates)} training rows that have one"
        )
    hide_seed = derive_seed(seed, HIDDEN_LABELS_SEED)
    hidden, _ = draw_stratified(len(candidates), int(size), labels, hide_seed)
    train.hide_labels(candidates[hidden])
    splits.hidden_labels = (
        f"those of {size} are kept, drawn by class from seed {seed}, the others hidden, as asked: "
        f"labelled={labelled}"
    )
