"""The splits of a source, opened: tables, streams or the user's DataLoaders; and their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from kdtoolkit.data.columns import ColumnNames
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.labels import NO_LABEL, check_labels, find_class_names, find_labels
from kdtoolkit.data.sources import OpenedSource, open_source
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import HFTable, Table, TorchTable
from kdtoolkit.data.user_loader import check_loader
from kdtoolkit.utils.validation import check_whole_number

SplitSource = Table | StreamDataset | DataLoader[Any]
"""What the rows of a split are read from."""


@dataclasses.dataclass
class OpenSplits:
    """The splits of a source while they are prepared; rows that are held out are added to it.

    Attributes:
        sources: What the rows of `"train"`, `"val"` and `"test"` are read from, those that there
            are.
        origins: Where the rows of each came from, in words.
        rows: Numbers of the rows of each split that is read from a table, (N,) integers.
        no_validation: Why there is no validation split, in words.
        hidden_labels: Which labels are hidden, in words; "" for none.
    """

    sources: dict[str, SplitSource]
    origins: dict[str, str]
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    no_validation: str = "not asked for"
    hidden_labels: str = ""

    @property
    def train(self) -> SplitSource:
        """What the training rows are read from."""
        return self.sources["train"]

    def tables(self) -> dict[str, Table]:
        """Return the sources that are tables, by split."""
        return {
            name: source
            for name, source in self.sources.items()
            if isinstance(source, HFTable | TorchTable)
        }

    def remove(self, split: str) -> None:
        """Remove a split, if there is one of that name.

        Args:
            split: "train", "val" or "test".
        """
        self.sources.pop(split, None)
        self.rows.pop(split, None)


def open_splits(opened: OpenedSource, eval_data: object, columns: ColumnNames | None) -> OpenSplits:
    """Open the splits of a source, and the test split of `eval_data`.

    A test split without labels is left out, and a validation split takes its place.

    Args:
        opened: The source of the training data.
        eval_data: The source of the test data, or None.
        columns: (image, label) columns of HF data sets; None: find them by type.

    Returns:
        The splits.

    Raises:
        ValueError: If a split is of no known kind, or `eval_data` has no labels.
    """
    sources = {name: _open_split(raw, name, columns) for name, raw in opened.splits.items()}
    origins = {name: f"the source's {name} split" for name in sources}
    splits = OpenSplits(sources, origins)
    if eval_data is not None:
        sources["test"] = _open_split(_test_split(eval_data), "test", columns)
        origins["test"] = "eval_data"
    _remove_unlabelled_test(splits)
    if "test" not in sources and "val" in sources:
        test = sources["test"] = sources.pop("val")
        origins["test"] = "the source's validation split (it has no labelled test split)"
        if not isinstance(test, DataLoader):
            test.split = "test"
    return splits


def _test_split(eval_data: object) -> Any:
    given = eval_data.test if isinstance(eval_data, Data) else eval_data
    if isinstance(given, Split):
        raise ValueError("eval_data is a Data: pass what it was loaded from")
    splits = open_source(given).splits
    return next(splits[name] for name in ("test", "val", "train") if name in splits)


def _open_split(raw: Any, split: str, columns: ColumnNames | None) -> SplitSource:
    import datasets

    if isinstance(raw, DataLoader):
        check_loader(raw, split)
        return raw
    if isinstance(raw, datasets.Dataset) and raw.format["type"] != "custom":
        return HFTable(raw, split, columns)
    if isinstance(raw, (datasets.IterableDataset, IterableDataset)):
        return StreamDataset(raw, split, columns)
    if hasattr(raw, "__getitem__") and hasattr(raw, "__len__"):
        return TorchTable(raw, split)
    raise ValueError(
        f"split {split!r} is a {type(raw).__name__}: expected an HF or torch data set, or a "
        "DataLoader"
    )


def _remove_unlabelled_test(splits: OpenSplits) -> None:
    test = splits.sources.get("test")
    if not isinstance(test, HFTable) or not bool((test.read_labels() == NO_LABEL).all()):
        return
    if splits.origins["test"] == "eval_data":
        raise ValueError("eval_data: every label is -1, so it is not labelled; pass labelled data")
    splits.remove("test")
    del splits.origins["test"]


def find_classes(
    sources: Mapping[str, SplitSource], num_classes: int | None
) -> tuple[tuple[str, ...] | None, int]:
    """Find the classes of all splits.

    Args:
        sources: The splits.
        num_classes: What the user gave, or None.

    Returns:
        Names of the classes, None where there are none, and their number.

    Raises:
        ValueError: If splits disagree on the names, or the number is another or cannot be found.
    """
    if num_classes is not None:
        check_whole_number("num_classes", num_classes)
    names = _common_names({split: _class_names(source) for split, source in sources.items()})
    if names:
        if num_classes not in (None, len(names)):
            raise ValueError(
                f"num_classes={num_classes}, but the data has {len(names)} classes: leave "
                "num_classes out"
            )
        return names, len(names)
    if num_classes is not None:
        return None, num_classes
    labels = _training_labels(sources["train"])
    if labels is None:
        raise ValueError(
            "the number of classes cannot be seen from the training data: pass num_classes="
        )
    return None, int(labels.max()) + 1


def _common_names(found: Mapping[str, tuple[str, ...] | None]) -> tuple[str, ...] | None:
    names = found["train"]
    for split, other in found.items():
        if names and other and names != other:
            shorter = min(len(names), len(other))
            differs = next((k for k in range(shorter) if names[k] != other[k]), shorter)
            ours, theirs = (list(n[differs : differs + 1]) or "nothing" for n in (names, other))
            raise ValueError(
                f"train has {len(names)} classes, {split} {len(other)}; class {differs} is {ours} "
                "in train and "
                f"{theirs} in {split}: the same label must mean the same class"
            )
    return names


def _class_names(source: SplitSource) -> tuple[str, ...] | None:
    if isinstance(source, DataLoader):
        return find_class_names(source.dataset)
    return source.class_names


def _training_labels(train: SplitSource) -> np.ndarray | None:
    if isinstance(train, DataLoader):
        return find_labels(train.dataset)
    return None if isinstance(train, StreamDataset) else train.read_labels()


def check_table_labels(splits: OpenSplits, num_classes: int) -> None:
    """Check the labels that tables state.

    Args:
        splits: The splits, with their rows.
        num_classes: Number of classes.

    Raises:
        ValueError: If a label is outside; a training row may be without one (-1).
    """
    for name, table in splits.tables().items():
        if table.labels is None:
            continue
        if name == "train":
            check_labels(table.labels, num_classes, name, allow_unlabelled=True)
        else:
            rows = splits.rows[name]
            check_labels(table.labels[rows], num_classes, name, rows)
