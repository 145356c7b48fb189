"""Opening what the user gives: a path, a name, an HF object, a torch data set or a DataLoader."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdtoolkit.data.files import open_path
from kdtoolkit.data.presets import PRESETS, Preset, load_digits
from kdtoolkit.data.split_names import NamedSplits, name_splits

if TYPE_CHECKING:
    from typing_extensions import Self

# Similarity to a preset from which a name counts as a misspelt one; "imagenet-1k" and "mnist" of
# the Hub are below.
MISSPELT_SIMILARITY = 0.8
ALLOWED = (
    "an HF Dataset, DatasetDict or IterableDataset; a torch Dataset or DataLoader; a preset "
    f"({', '.join(PRESETS)}); a name on the Hub; or a path to parquet files, to a saved data set "
    "or to an image folder"
)


@dataclasses.dataclass
class OpenedSource:
    """A source whose splits are known.

    Attributes:
        name: Name of the data set.
        splits: HF or torch data set, or DataLoader, of `"train"`, `"val"` and `"test"`, those that
            there are.
        preset: What is known of a named data set.
        names: Our name of a split -> the source's.
        notes: Sentences about what was left out or decided.
    """

    name: str
    splits: dict[str, Any]
    preset: Preset | None = None
    names: dict[str, str] = dataclasses.field(default_factory=lambda: {"train": "train"})
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of_named(
        cls, name: str, found: NamedSplits, preset: Preset | None = None, notes: Sequence[str] = ()
    ) -> Self:
        """Make it of splits that have been named.

        Args:
            name: Name of the data set.
            found: The splits.
            preset: What is known of a named data set.
            notes: Sentences that stand before those of the splits.
        """
        return cls(name, found.splits, preset, found.names, [*notes, *found.notes])


def open_source(source: object, data_path: str | os.PathLike[str] | None = None) -> OpenedSource:
    """Open data of any kind.

    Args:
        source: What `load` takes as `train_data`, except a `Data`.
        data_path: Local copy of a named data set.

    Returns:
        The splits that it has.

    Raises:
        ValueError: If it is of no known kind or has no training split.
        FileNotFoundError: If a path does not exist.
        OSError: If a named data set cannot be fetched from the Hub.
    """
    import datasets

    if isinstance(source, (str, os.PathLike)):
        return _open_name(os.fspath(source), data_path)
    if data_path is not None:
        raise ValueError(
            f"data_path={os.fspath(data_path)!r} is a local copy of a named data set, "
            f"not of {type(source).__name__}: leave it out"
        )
    name = type(source).__name__
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        first_hf = next((part for part in source.values() if hasattr(part, "info")), None)
        return OpenedSource.of_named(_hf_name(first_hf) or name, name_splits(source, name))
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return OpenedSource(_hf_name(source) or name, {"train": source})
    if isinstance(source, DataLoader):
        return OpenedSource(type(source.dataset).__name__, {"train": source})
    is_map_style = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, TorchDataset) or (is_map_style and not isinstance(source, (list, tuple))):
        return OpenedSource(name, {"train": source})
    raise ValueError(f"data of type {name}: expected {ALLOWED}")


def _hf_name(dataset: object) -> str | None:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return None if name in (None, "parquet", "generator", "imagefolder") else str(name)


def _open_name(name: str, data_path: str | os.PathLike[str] | None) -> OpenedSource:
    preset = PRESETS.get(name)
    _check_not_empty(name, "the name or path of the data")
    if data_path is not None:
        _check_not_empty(os.fspath(data_path), "data_path")
        return _open_folder(name, Path(data_path), preset)
    if name == "digits":
        return OpenedSource.of_named(name, name_splits(load_digits(), name), preset)
    if preset is None:
        path = Path(name).expanduser()
        if path.exists():
            return _open_folder(path.stem or path.resolve().stem, path)
        _check_hub_name(name)
    hub_id = preset.hub_id if preset and preset.hub_id else name
    return OpenedSource.of_named(
        name, name_splits(_fetch(hub_id, preset is not None), name), preset
    )


def _open_folder(name: str, path: Path, preset: Preset | None = None) -> OpenedSource:
    found = open_path(path.expanduser())
    return OpenedSource.of_named(name, name_splits(found.splits, str(path)), preset, found.notes)


def _check_not_empty(text: str, what: str) -> None:
    if not text.strip():
        raise ValueError(
            f"{what} is {text!r}: an empty path would be the current folder; pass '.' if that is "
            "meant"
        )


def _check_hub_name(name: str) -> None:
    """Refuse a path that does not exist and a misspelt preset, before the Hub is asked."""
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(f"no such file or folder: {name}. Expected {ALLOWED}.")
    lower = name.lower()
    if any(lower.startswith(f"{preset}-") for preset in PRESETS):
        return  # a name of its own on the Hub, such as "imagenet-1k"
    if "/" in name or not difflib.get_close_matches(lower, PRESETS, 1, MISSPELT_SIMILARITY):
        return
    close = difflib.get_close_matches(lower, PRESETS, 2, MISSPELT_SIMILARITY - 0.1)
    suggestion = " or ".join(map(repr, close))
    raise ValueError(f"unknown data set {name!r}. Did you mean {suggestion}? Expected {ALLOWED}.")


def _fetch(hub_id: str, is_preset: bool) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(hub_id))
    except OSError as e:  # not found, or not reached
        hint = "" if is_preset else f" Presets: {', '.join(PRESETS)}."
        raise OSError(
            f"data set {hub_id!r} could not be fetched from the Hub: {e}. "
            f"Without a network pass a local copy: --data PATH or data_path=...{hint}"
        ) from e
