"""Names of splits: which split of a source is train, validation and test, and which is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Our name -> the names that a source may use, in any case; of several the first is taken."""

FULL_NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclasses.dataclass
class NamedSplits:
    """The splits of a source by our names.

    Attributes:
        splits: Data of `"train"`, `"val"` and `"test"`, those that there are.
        names: Our name -> the source's name.
        notes: Sentences about splits that are left out or used in another place.
    """

    splits: dict[str, Any]
    names: dict[str, str]
    notes: list[str] = dataclasses.field(default_factory=list)


def split_of(name: object) -> str | None:
    """Find which split a name stands for.

    Args:
        name: Name of a split or a folder, in any case.

    Returns:
        "train", "val" or "test"; None for any other name.
    """
    word = str(name).strip().lower()
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def name_splits(splits: Mapping[Any, Any], source: str) -> NamedSplits:
    """Rename the splits of a source to "train", "val" and "test"; a single split becomes "train".

    Args:
        splits: Data by the source's name of the split.
        source: Name of the source, for the message.

    Returns:
        The splits, with a note for each that is left out.

    Raises:
        ValueError: If there are several splits and none to train on.
    """
    names: dict[str, Any] = {}
    for split, known in SPLIT_NAMES.items():
        found = [name for name in splits if split_of(name) == split]
        if found:
            names[split] = min(found, key=lambda name: known.index(str(name).strip().lower()))
    notes = []
    if "train" not in names:
        if len(splits) != 1:
            raise ValueError(
                f"{source} has the splits {', '.join(map(str, splits)) or '(none)'}, no 'train': "
                "pass one of them"
            )
        names = {"train": next(iter(splits))}
        notes.append(f"{str(names['train'])!r}, the only split, is trained on")
    for name, part in splits.items():
        if name not in names.values():
            notes.append(_describe_left_out(name, part, names))
    found_splits = {split: splits[name] for split, name in names.items()}
    return NamedSplits(found_splits, {k: str(name) for k, name in names.items()}, notes)


def _describe_left_out(name: object, part: object, names: Mapping[str, Any]) -> str:
    split = split_of(name)
    if split is not None:
        reason = f"{str(names[split])!r} is the {FULL_NAMES[split]} split"
    else:
        reason = "its name is not that of a training, validation or test split"
    return (
        f"split {str(name)!r}{describe_rows(part)} is left out: {reason}. To use it, pass it as "
        "train_data or eval_data"
    )


def describe_rows(part: object) -> str:
    """Say how many rows a part of a source has.

    Args:
        part: A data set, or a DataLoader, whose rows are those of its data set.

    Returns:
        " (12 rows)", or "" where the number is not known.
    """
    counted: Any = getattr(part, "dataset", part)
    try:
        count = len(counted)
    except TypeError:  # a stream
        return ""
    return f" ({count:,} rows)"
