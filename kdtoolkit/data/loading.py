"""load(): any source -> Data with train, validation and test splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from kdtoolkit.data.augment import BatchAugment, key
from kdtoolkit.data.batching import RawSplit, build_split, choose_batching, storage
from kdtoolkit.data.cache import Cached
from kdtoolkit.data.columns import check_labels
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.sources import open_source
from kdtoolkit.data.splits import TEST_SHARE, check_validation, draw_stratified, validation_rows
from kdtoolkit.data.tables import HFTable, SizesDiffer, TorchTable, class_names_of, labels_of
from kdtoolkit.data.workers import Rows, Stream, all_labels, check_loader

Columns = tuple[str | None, str | None]


def load(
    train_data: Any,
    eval_data: Any = None,
    *,
    seed: int = 0,
    validation: str | int | float | None = "auto",
    transforms: Any = None,
    num_classes: int | None = None,
    num_workers: int | str = "auto",
    image_size: int | tuple[int, int] | None = None,
    data_path: str | os.PathLike | None = None,
    train_limit: int | None = None,
    labelled: int | float | None = None,
    columns: Columns | None = None,
) -> Data:
    """Open data of any kind, split it and choose how batches are made.

    train_data   HF Dataset, DatasetDict, IterableDataset; torch Dataset or DataLoader; a preset or a name on the Hub;
                 a path to parquet files, a saved data set or an image folder; a Data (returned as it is). A DataLoader
                 keeps its batch size, order and transforms; its x is uint8 or floats in [0, 1], not normalised.
    eval_data    the same kinds; becomes the test split
    validation   "auto": the source's own, else 10 % of train (at most 5,000 rows) by class from `seed`; a share; rows;
                 "none"; "test": choose on the test set
    transforms   None: as the preset, or shift + flip for small images of equal size, or RandomResizedCrop + flip;
                 "none"; "crop-flip"; a BatchAugment; a callable on a PIL image giving (3, H, W); (for train, for eval)
    num_workers  "auto": 0 for data in memory, else min(8, cores)
    image_size   pixels; images are resized to it; 224 where sizes differ and nothing is given
    data_path    local copy of a named data set
    train_limit  train on this many rows only, drawn by class from `seed` after the validation rows
    labelled     keep the labels of this many training rows (an int), or of this share of them (a float), drawn by class
                 from `seed` after all that; those of the others are hidden. None keeps them all
    columns      (image, label) columns of an HF data set, where finding them by type does not do

    Training rows with the label -1, null or None are rows without a label: `Data.unlabelled` counts them, and rows for
    validation and test are drawn among the others.
    """
    if isinstance(train_data, Data):
        return train_data
    mode, spec = check_validation(validation), check_transforms(transforms)
    size, workers = check_size(image_size), check_workers(num_workers)
    source = open_source(train_data, data_path)
    parts = {role: as_part(raw, role, columns) for role, raw in source.splits.items()}
    origin = {role: f"the source's {role} split" for role in parts}
    if eval_data is not None:
        given = eval_data.test if isinstance(eval_data, Data) else eval_data
        if isinstance(given, Split):
            raise ValueError("eval_data is a Data: pass what it was loaded from")
        splits = open_source(given).splits
        raw = next(splits[role] for role in ("test", "val", "train") if role in splits)
        parts["test"], origin["test"] = as_part(raw, "test", columns), "eval_data"
    _drop_unlabelled(parts, origin)
    if "test" not in parts and "val" in parts:
        test = parts["test"] = parts.pop("val")
        origin["test"] = "the source's validation split (it has no labelled test split)"
        if not isinstance(test, DataLoader):
            test.split = "test"
    names, count = classes(parts, num_classes)
    rows = draw_rows(parts, origin, mode, seed, train_limit)
    for role, part in parts.items():
        if not isinstance(part, HFTable | TorchTable) or part.labels is None:
            continue
        if role == "train":
            check_labels(part.labels, count, role, unlabelled=True)
        else:
            check_labels(part.labels[rows[role]], count, role, rows[role])
    if labelled is not None:
        origin["labels"] = hide_labels(parts["train"], rows, labelled, seed)
    preset = source.preset.augment if source.preset else None
    plan = choose_batching(parts, rows, spec, preset, size)
    try:
        made = build_split(parts, rows, origin, plan, count, seed, workers)
    except SizesDiffer as e:
        plan = choose_batching(parts, rows, spec, preset, size, differ=True)
        plan.text += f" (sizes differ: {e})"
        made = build_split(parts, rows, origin, plan, count, seed, workers)
    if mode == "test":
        if "test" not in made:
            raise ValueError("validation='test': there is no test split to choose on")
        made["val"] = dataclasses.replace(
            made["test"], name="val", origin="the test set, as asked: validation='test'"
        )
    train = parts["train"]
    notes = {
        "seed": seed,
        "validation": made["val"].origin
        if "val" in made
        else "none: " + origin.get("no val", "not asked for"),
        "augmentation": plan.text,
        "columns": getattr(train, "note", "batches of the user's DataLoader"),
        "storage": storage(made),
    }
    unlabelled = _unlabelled(made["train"])
    if unlabelled:
        told = f"{unlabelled} of {len(made['train'])} training rows have no label"
        notes["labels"] = f"{told}: {origin['labels']}" if "labels" in origin else told
    return Data(
        name=source.name,
        num_classes=count,
        class_names=list(names) if names else None,
        image_size=plan.size,
        train=made["train"],
        val=made.get("val"),
        test=made.get("test"),
        augment=plan.augment,
        seed=seed,
        notes=notes,
        unlabelled=unlabelled,
    )


# --- arguments


def check_transforms(transforms: Any) -> Any:
    """None, "none", "crop-flip", a BatchAugment, or a pair (train callable, eval callable)."""
    if (
        transforms is None
        or transforms in ("none", "crop-flip")
        or isinstance(transforms, BatchAugment)
    ):
        return transforms
    if isinstance(transforms, tuple) and len(transforms) == 2 and all(map(callable, transforms)):
        return transforms
    if callable(transforms):
        return transforms, transforms
    raise ValueError(
        f"transforms={transforms!r}: allowed are None, 'none', 'crop-flip', a BatchAugment, a callable on a PIL image, "
        "or a tuple (for train, for eval) of callables"
    )


def check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Pixels -> (H, W)."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise ValueError(f"image_size={size!r}: a number of pixels or (height, width)")
    return pair


def check_workers(workers: int | str) -> int | None:
    """None stands for "auto"."""
    if workers == "auto":
        return None
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 0:
        return workers
    raise ValueError(f"num_workers={workers!r}: 'auto' or a number of processes, 0 or more")


# --- parts and classes


def as_part(raw: Any, role: str, columns: Columns | None) -> RawSplit:
    """One raw split -> a table, a stream or the user's loader."""
    if isinstance(raw, DataLoader):
        check_loader(raw, role)
        return raw
    if isinstance(raw, datasets.Dataset) and raw.format["type"] != "custom":
        return HFTable(raw, role, columns)
    if isinstance(raw, (datasets.IterableDataset, IterableDataset)):
        return Stream(raw, role, columns)
    if hasattr(raw, "__getitem__") and hasattr(raw, "__len__"):
        return TorchTable(raw, role)
    raise ValueError(
        f"split {role!r} is a {type(raw).__name__}: expected an HF or torch data set, or a DataLoader"
    )


def _drop_unlabelled(parts: dict[str, RawSplit], origin: dict[str, str]) -> None:
    test = parts.get("test")
    if isinstance(test, HFTable) and test.labels is not None and bool((test.labels == -1).all()):
        if origin["test"] == "eval_data":
            raise ValueError(
                "eval_data: every label is -1, so it is not labelled; pass labelled data"
            )
        del parts["test"], origin["test"]


def classes(parts: Mapping[str, RawSplit], given: int | None) -> tuple[tuple[str, ...] | None, int]:
    """Class names (None when there are none) and their number; all splits must agree on the names."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ValueError(f"num_classes={given!r}: a whole number, 1 or more")
    found = {role: _names(part) for role, part in parts.items()}
    names = found["train"]
    for role, other in found.items():
        if names and other and names != other:
            shorter = min(len(names), len(other))
            at = next((k for k in range(shorter) if names[k] != other[k]), shorter)
            a, b = (list(n[at : at + 1]) or "nothing" for n in (names, other))
            raise ValueError(
                f"train has {len(names)} classes, {role} {len(other)}; class {at} is {a} in train and {b} in {role}: "
                "the same label must mean the same class"
            )
    if names:
        if given not in (None, len(names)):
            raise ValueError(
                f"num_classes={given}, but the data has {len(names)} classes: leave num_classes out"
            )
        return names, len(names)
    if given is not None:
        return None, given
    train = parts["train"]
    labels = (
        labels_of(train.dataset)
        if isinstance(train, DataLoader)
        else getattr(train, "labels", None)
    )
    if labels is None and isinstance(train, TorchTable):
        labels = all_labels(train)
    if labels is None:
        raise ValueError(
            "the number of classes cannot be seen from the training data: pass num_classes="
        )
    return None, int(labels.max()) + 1


def _names(part: RawSplit) -> tuple[str, ...] | None:
    return class_names_of(part.dataset) if isinstance(part, DataLoader) else part.class_names


# --- rows


def hide_labels(
    train: RawSplit, rows: Mapping[str, np.ndarray], labelled: int | float, seed: int
) -> str:
    """Hide the labels of all training rows but so many; what was done, for people."""
    whole = isinstance(labelled, int) and not isinstance(labelled, bool)
    if not (whole and labelled >= 1) and not (isinstance(labelled, float) and 0 < labelled <= 1):
        raise ValueError(
            f"labelled={labelled!r}: a number of rows from 1, or a share of them such as 0.1"
        )
    if not isinstance(train, HFTable | TorchTable):
        raise ValueError(
            f"labelled={labelled}: rows of a stream or a DataLoader cannot be drawn; pass a map-style data set"
        )
    here = rows["train"][all_labels(train)[rows["train"]] >= 0]
    labels = all_labels(train)[here]
    size, classes = labelled if whole else round(labelled * len(here)), len(np.unique(labels))
    if not classes <= size <= len(here):
        raise ValueError(
            f"labelled={labelled} keeps the labels of {size} rows: at least one for each of the {classes} classes and "
            f"at most the {len(here)} training rows that have one"
        )
    rest, _ = draw_stratified(len(here), int(size), labels, key(seed, 2))
    train.hide(here[rest])
    return f"those of {size} are kept, drawn by class from seed {seed}, the others hidden, as asked: labelled={labelled}"


def _unlabelled(train: Split) -> int:
    """Rows without a label; where only reading tells, such rows are an error then."""
    known = isinstance(train.dataset, Cached) or (
        isinstance(train.dataset, Rows) and train.dataset.unlabelled
    )
    return int((train.dataset.row_labels() < 0).sum()) if known else 0  # type: ignore[attr-defined]


def draw_rows(
    parts: dict[str, RawSplit],
    origin: dict[str, str],
    mode: str | int | float,
    seed: int,
    limit: int | None,
) -> dict[str, np.ndarray]:
    """Row numbers of each split that is a table; adds held-out splits to `parts`, and says so in `origin`."""
    rows = {
        role: np.arange(len(p)) for role, p in parts.items() if isinstance(p, HFTable | TorchTable)
    }
    train = parts["train"]
    if mode in ("none", "test"):
        parts.pop("val", None)
        rows.pop("val", None)
    if not isinstance(train, HFTable | TorchTable):
        if limit is not None or not isinstance(mode, str):
            what = f"train_limit={limit}" if limit is not None else f"validation={mode}"
            raise ValueError(
                f"{what}: rows of a stream or a DataLoader cannot be drawn; pass a map-style data set"
            )
        if mode == "auto" and "val" not in parts:
            origin["no val"] = "rows of a stream or a DataLoader cannot be held out"
        return rows

    def labelled() -> np.ndarray:
        here = rows["train"]
        return here if train.labels is None else here[train.labels[here] >= 0]

    def draw(size: int, among: np.ndarray, seed: int) -> np.ndarray:
        return among[
            draw_stratified(
                len(among), size, None if train.labels is None else train.labels[among], seed
            )[1]
        ]

    def hold_out(size: int, seed: int) -> np.ndarray:
        out = draw(size, labelled(), seed)
        rows["train"] = np.setdiff1d(rows["train"], out, assume_unique=True)
        return out

    if not len(labelled()):
        raise ValueError(
            f"none of {len(train)} training rows has a label: there is nothing to learn from"
        )
    how = "at random" if train.labels is None else "by class"
    if "test" not in parts:
        size = round(TEST_SHARE * len(labelled()))
        if size < 1:
            raise ValueError(
                f"{len(train)} training rows and no test data: too few to hold some out; pass eval_data"
            )
        rows["test"], parts["test"] = hold_out(size, 0), train
        origin["test"] = (
            f"held out of train, as no labelled test split: {size} rows, drawn {how}, the same for all seeds"
        )
    if mode not in ("none", "test") and ("val" not in parts or mode != "auto"):
        size = validation_rows(mode, len(labelled()))
        rows["val"], parts["val"] = hold_out(size, seed), train
        origin["val"] = f"held out of train: {size} rows, drawn {how} from seed {seed}"
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"train_limit={limit!r}: a number of rows, 1 or more")
        if limit < len(rows["train"]):
            rows["train"] = draw(limit, rows["train"], key(seed, 1))
            origin["train"] += f", limited to {limit} rows drawn {how} from seed {seed}"
    return rows
