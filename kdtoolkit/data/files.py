"""Data in files: parquet, data sets written by `save_to_disk` and image folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}  # our name -> the names that a source may use
ALL_SPLIT_NAMES = {name for names in SPLIT_NAMES.values() for name in names}


def name_splits(splits: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Rename the splits of a source to "train", "val" and "test"; a single split becomes "train".

    Args:
        splits: Data by the source's name of the split.
        source: Name of the source, for the message.

    Returns:
        Data by our name of the split.

    Raises:
        ValueError: If there are several splits and none to train on.
    """
    found = {}
    for split, names in SPLIT_NAMES.items():
        name = next((name for name in names if name in splits), None)
        if name is not None:
            found[split] = splits[name]
    if "train" in found:
        return found
    if len(splits) == 1:
        return {"train": next(iter(splits.values()))}
    raise ValueError(
        f"{source} has the splits {', '.join(map(str, splits)) or '(none)'}, no 'train': pass one "
        "of them"
    )


def open_path(path: Path) -> dict[str, Any]:
    """Open a parquet file, or a folder of parquet files, of a saved data set or of images.

    Args:
        path: The file or folder.

    Returns:
        HF data sets by the source's name of the split.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it holds no known data, or a file is damaged or empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    ):
        return _open_saved(path)
    is_parquet = path.is_file() and path.suffix == ".parquet"
    files = [path] if is_parquet else sorted(path.rglob("*.parquet"))
    if files:
        return _open_parquet(path, files)
    if path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        return _open_images(path)
    raise ValueError(
        f"{path} holds no data that is known: expected *.parquet, a data set written by "
        "save_to_disk, "
        "or images as train/CLASS/x.png or CLASS/x.png"
    )


def _open_saved(path: Path) -> dict[str, Any]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _open_images(path: Path) -> dict[str, Any]:
    """Open train/CLASS/x.png, or CLASS/x.png as one split.

    Splits are folders, never guessed from the names of files.
    """
    import datasets

    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    splits = {f.name.lower(): f for f in folders if f.name.lower() in ALL_SPLIT_NAMES}
    patterns = {name: str(folder / "**") for name, folder in (splits or {"train": path}).items()}
    return dict(datasets.load_dataset("imagefolder", data_files=patterns, drop_labels=False))


def _open_parquet(path: Path, files: list[Path]) -> dict[str, Any]:
    import datasets

    groups: dict[str, list[str]] = {}
    for file in files:
        _check_parquet(file)
        groups.setdefault(_split_name(file, path), []).append(str(file))
    if "" in groups:
        if len(groups) > 1:
            raise ValueError(
                f"{groups[''][0]}: which split? Start its name with train, validation or test, as "
                "others do"
            )
        groups = {"train": groups[""]}
    try:
        return dict(datasets.load_dataset("parquet", data_files=groups))
    except datasets.exceptions.DatasetGenerationError as e:
        raise ValueError(
            f"{path}: the parquet files could not be read: {e.__cause__ or e}. Fetch them again."
        ) from e


def _check_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        num_rows = pq.ParquetFile(file).metadata.num_rows
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{file} is not a whole parquet file: {e}. Fetch it again.") from e
    if num_rows == 0:
        raise ValueError(f"{file} holds no rows. Fetch it again, or remove it.")


def _split_name(file: Path, root: Path) -> str:
    """The split that a file's name starts with, else that of its folder under `root`, else ""."""
    first_word = file.stem.lower().replace("_", "-").split("-")[0]
    if first_word in ALL_SPLIT_NAMES:
        return first_word
    for folder in file.parents:
        if folder.is_relative_to(root) and folder != root and folder.name in ALL_SPLIT_NAMES:
            return folder.name.lower()
    return ""
