"""The splits of a source, opened: tables, streams or the user's DataLoaders."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from kdtoolkit.data.columns import ColumnNames
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.image_reader import ImageReader
from kdtoolkit.data.label_values import NO_LABEL
from kdtoolkit.data.labels import check_labels
from kdtoolkit.data.sources import OpenedSource, open_source
from kdtoolkit.data.split_names import FULL_NAMES, describe_rows
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import HFTable, Table, TorchTable
from kdtoolkit.data.user_loader import check_loader

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
        notes: Sentences about what was left out or decided, for the plan.
        reader: Reads the images of all splits.
        probed_sizes: The different (H, W) in pixels of the images looked at, by split.
    """

    sources: dict[str, SplitSource]
    origins: dict[str, str]
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    no_validation: str = "not asked for"
    hidden_labels: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    reader: ImageReader = dataclasses.field(default_factory=ImageReader)
    probed_sizes: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

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

    A validation or test split without labels is left out, with a note.

    Args:
        opened: The source of the training data.
        eval_data: The source of the test data, or None.
        columns: (image, label) columns of HF data sets; None: find them.

    Returns:
        The splits.

    Raises:
        ValueError: If a split is of no known kind, or `eval_data` has no labels.
    """
    splits = OpenSplits({}, {}, notes=list(opened.notes))
    train = splits.sources["train"] = _open_split(opened.splits["train"], "train", columns)
    for name, raw in opened.splits.items():
        if name != "train" and not (name == "test" and eval_data is not None):
            source = _open_labelled(raw, name, columns, train)
            if source is None:
                splits.notes.append(_describe_unlabelled(name, opened.names[name], raw))
            else:
                splits.sources[name] = source
    splits.origins |= {name: f"the source's {opened.names[name]} split" for name in splits.sources}
    if eval_data is not None:
        if "test" in opened.splits:
            rows = describe_rows(opened.splits["test"])
            splits.notes.append(
                f"split {opened.names['test']!r}{rows} is left out: eval_data is the test split"
            )
        _open_eval_data(splits, eval_data, columns)
    return splits


def _open_eval_data(splits: OpenSplits, eval_data: object, columns: ColumnNames | None) -> None:
    given = eval_data.test if isinstance(eval_data, Data) else eval_data
    if isinstance(given, Split):
        raise ValueError("eval_data is a Data: pass what it was loaded from")
    found = open_source(given)
    splits.notes += [f"eval_data: {note}" for note in found.notes]
    name = next(name for name in ("test", "val", "train") if name in found.splits)
    for other, part in found.splits.items():
        if other != name:
            splits.notes.append(
                f"eval_data: split {found.names[other]!r}{describe_rows(part)} is left out: "
                f"{found.names[name]!r} is the test split"
            )
    raw = found.splits[name]
    if _has_label_column(raw, splits.train):
        columns = _columns_of(splits.train, raw) or columns
    source = _open_split(raw, "test", columns)
    if _is_unlabelled(source):
        raise ValueError("eval_data: every label is -1, so it is not labelled; pass labelled data")
    splits.sources["test"], splits.origins["test"] = source, "eval_data"


def _open_labelled(
    raw: Any, split: str, columns: ColumnNames | None, train: SplitSource
) -> SplitSource | None:
    """Open a split for evaluation; None if it has no labels.

    Its columns are those of the training data: another column is no label.
    """
    if not _has_label_column(raw, train):
        return None
    columns = _columns_of(train, raw) or columns
    source = _open_split(raw, split, columns)
    return None if _is_unlabelled(source) else source


def _columns_of(train: SplitSource, raw: Any) -> ColumnNames | None:
    """The columns of the training data, as far as another split has them."""
    found = getattr(train, "columns", None)
    features = getattr(raw, "features", None)
    if found is None or not features:
        return None
    return (found.image if found.image in features else None), found.label


def _has_label_column(raw: Any, train: SplitSource) -> bool:
    """Whether an HF data set has the label column of the training data; True where unknown."""
    found = getattr(train, "columns", None)
    features = getattr(raw, "features", None)
    return found is None or not features or found.label in features


def _is_unlabelled(source: SplitSource) -> bool:
    labels = source.labels if isinstance(source, HFTable | TorchTable) else None
    return labels is not None and bool((labels == NO_LABEL).all())


def _describe_unlabelled(split: str, name: str, raw: object) -> str:
    return (
        f"split {name!r}{describe_rows(raw)} is left out: its rows have no labels, so that there "
        f"is no {FULL_NAMES[split]} split"
    )


def _open_split(raw: Any, split: str, columns: ColumnNames | None) -> SplitSource:
    import datasets

    if isinstance(raw, datasets.Dataset) and raw.format["type"] != "custom":
        return HFTable(raw, split, columns)
    if isinstance(raw, datasets.IterableDataset):
        return StreamDataset(raw, split, columns)
    if isinstance(raw, DataLoader):
        check_loader(raw, split)
        return raw
    if isinstance(raw, IterableDataset):
        return StreamDataset(raw, split)
    if hasattr(raw, "__getitem__") and hasattr(raw, "__len__"):
        return TorchTable(raw, split)
    raise ValueError(
        f"split {split!r} is a {type(raw).__name__}: expected an HF or torch data set, or a "
        "DataLoader"
    )


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
