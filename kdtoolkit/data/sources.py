"""What the user hands in -> named raw splits: a path, a name, an HF object, a torch data set or a loader."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdtoolkit.data.presets import PRESETS, Preset, digits
from kdtoolkit.data.splits import TEST, TRAIN, VAL

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
NEAR = 0.8  # likeness to a preset from which a name is a misspelt one; "imagenet-1k" and "mnist" of the Hub are below
ALLOWED = (
    "an HF Dataset, DatasetDict or IterableDataset; a torch Dataset or DataLoader; a preset "
    f"({', '.join(PRESETS)}); a name on the Hub; or a path to parquet files, to a saved data set or to an image folder"
)


@dataclasses.dataclass
class Source:
    """splits: "train", "val", "test" (those that there are) -> raw data."""

    name: str
    splits: dict[str, Any]
    preset: Preset | None = None


def open_source(source: Any, data_path: str | os.PathLike | None = None) -> Source:
    """Open `source`; `data_path` is a local copy of a named data set."""
    if isinstance(source, (str, os.PathLike)):
        return _open_name(os.fspath(source), data_path)
    if data_path is not None:
        raise ValueError(
            f"data_path={os.fspath(data_path)!r} is a local copy of a named data set, not of {type(source).__name__}"
        )
    name = type(source).__name__
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        raw = dict(source)
        hf = next((part for part in raw.values() if hasattr(part, "info")), None)
        return Source(_hf_name(hf) or name, by_role(raw, name))
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return Source(_hf_name(source) or name, {"train": source})
    if isinstance(source, DataLoader):
        return Source(type(source.dataset).__name__, {"train": source})
    if isinstance(source, TorchDataset) or (
        hasattr(source, "__getitem__") and hasattr(source, "__len__")
    ):
        if not isinstance(source, (list, tuple)):
            return Source(name, {"train": source})
    raise ValueError(f"data of type {name}: expected {ALLOWED}")


def _hf_name(dataset: Any) -> str | None:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return None if name in (None, "parquet", "generator", "imagefolder") else str(name)


def by_role(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """Splits under the source's names -> under "train", "val" and "test"; a single split is "train"."""
    roles = {"train": TRAIN, "val": VAL, "test": TEST}
    found = {}
    for role, names in roles.items():
        match = next((raw[alias] for alias in names if alias in raw), None)
        if match is not None:
            found[role] = match
    if "train" not in found and len(raw) == 1:
        return {"train": next(iter(raw.values()))}
    if "train" not in found:
        raise ValueError(
            f"{name} has the splits {', '.join(map(str, raw)) or '(none)'}, no 'train': pass one of them"
        )
    return found


def _open_name(name: str, data_path: str | os.PathLike | None) -> Source:
    preset = PRESETS.get(name)
    if data_path is not None:
        return Source(
            name, by_role(_open_path(Path(data_path).expanduser()), str(data_path)), preset
        )
    if name == "digits":
        return Source(name, by_role(dict(digits()), name), preset)
    path = Path(name).expanduser()
    if preset is None and path.exists():
        return Source(path.stem, by_role(_open_path(path), name))
    if preset is None and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"no such file or folder: {name}. Expected {ALLOWED}.")
    if (
        preset is None
        and "/" not in name
        and difflib.get_close_matches(name.lower(), PRESETS, 1, NEAR)
    ):
        meant = " or ".join(
            map(repr, difflib.get_close_matches(name.lower(), PRESETS, 2, NEAR - 0.1))
        )
        raise ValueError(f"unknown data set {name!r}. Did you mean {meant}? Expected {ALLOWED}.")
    hub = preset.hub if preset and preset.hub else name
    try:
        return Source(name, by_role(dict(datasets.load_dataset(hub)), name), preset)
    except OSError as e:  # not found, or not reached
        hint = "" if preset else f" Presets: {', '.join(PRESETS)}."
        raise OSError(
            f"data set {hub!r} could not be fetched from the Hub: {e}. "
            f"Without a network pass a local copy: --data PATH or data_path=...{hint}"
        ) from e


def _open_path(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir() and (
        (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    ):
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    files = (
        [path] if path.is_file() and path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    )
    if files:
        return _open_parquet(path, files)
    if path.is_dir() and any(file.suffix.lower() in IMAGES for file in path.rglob("*")):
        return _open_images(path)
    raise ValueError(
        f"{path} holds no data that is known: expected *.parquet, a data set written by save_to_disk, "
        "or images as train/CLASS/x.png or CLASS/x.png"
    )


def _open_images(path: Path) -> dict[str, Any]:
    """train/CLASS/x.png, or CLASS/x.png as one split. Splits are folders, never guessed from the files' names."""
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    splits = {
        name: folder for name, folder in folders.items() if name.lower() in TRAIN + VAL + TEST
    }
    chosen = splits if splits else {"train": path}
    patterns = {name.lower(): str(folder / "**") for name, folder in chosen.items()}
    return dict(datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False))


def _open_parquet(path: Path, files: list[Path]) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for file in files:
        try:
            rows = pq.ParquetFile(file).metadata.num_rows
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{file} is not a whole parquet file: {e}. Fetch it again.") from e
        if rows == 0:
            raise ValueError(f"{file} holds no rows. Fetch it again, or remove it.")
        groups.setdefault(_split_of(file, path), []).append(str(file))
    if "" in groups:
        if len(groups) > 1:
            raise ValueError(
                f"{groups[''][0]}: which split? Start its name with train, validation or test, as others do"
            )
        groups = {"train": groups[""]}
    try:
        return dict(datasets.load_dataset("parquet", data_files=groups))
    except datasets.exceptions.DatasetGenerationError as e:
        raise ValueError(f"{path}: the parquet files could not be read: {e.__cause__ or e}") from e


def _split_of(file: Path, root: Path) -> str:
    """The split named at the start of the file's name, else by its folder under `root`; "" if neither."""
    known = TRAIN + VAL + TEST
    word = file.stem.lower().replace("_", "-").split("-")[0]
    if word in known:
        return word
    return next(
        (
            p.name.lower()
            for p in file.parents
            if p.is_relative_to(root) and p != root and p.name in known
        ),
        "",
    )
