"""Data in files: parquet, data sets written by `save_to_disk` and image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdtoolkit.data.folder_tree import Folder, scan_folder, unwrap
from kdtoolkit.data.image_folder import OpenedSplits, open_image_folder
from kdtoolkit.data.split_names import split_of

SAVED_FILES = ("dataset_dict.json", "state.json")  # of a data set that save_to_disk wrote
METADATA_SUFFIXES = (".csv", ".jsonl")  # metadata.csv: labels of images, as HF reads them


def open_path(path: Path) -> OpenedSplits:
    """Open a parquet file, or a folder of parquet files, of a saved data set or of images.

    A folder that holds nothing but one folder is a wrapper, which is gone through.

    Args:
        path: The file or folder.

    Returns:
        The data by split.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it holds no known data, or a file is damaged or empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise _unknown_data(path)
        return OpenedSplits(_open_parquet(path, [path]))
    tree = scan_folder(path)
    saved = _find_saved(tree)
    if saved is not None:
        return OpenedSplits(_open_saved(saved))
    files = _parquet_files(tree)
    if files:
        return OpenedSplits(_open_parquet(path, files))
    if not tree.num_images:
        raise _unknown_data(path)
    if any(_is_metadata(name) for name in tree.all_others()):
        return OpenedSplits(_open_with_metadata(unwrap(tree).path))
    return open_image_folder(tree)


def _unknown_data(path: Path) -> ValueError:
    return ValueError(
        f"{path} holds no data that is known: expected *.parquet, a data set written by "
        "save_to_disk, "
        "or images as train/CLASS/x.png or CLASS/x.png"
    )


def _find_saved(tree: Folder) -> Path | None:
    """The folder that `save_to_disk` wrote: this one, or the only one in it, and so on."""
    while True:
        if any(name in tree.others for name in SAVED_FILES):
            return tree.path
        if len(tree.folders) != 1:
            return None
        tree = next(iter(tree.folders.values()))


def _open_saved(path: Path) -> dict[str, Any]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _parquet_files(tree: Folder) -> list[Path]:
    own = [tree.path / name for name in tree.others if name.lower().endswith(".parquet")]
    return own + [file for folder in tree.folders.values() for file in _parquet_files(folder)]


def _is_metadata(name: str) -> bool:
    stem, dot, suffix = name.lower().rpartition(".")
    return stem == "metadata" and dot + suffix in METADATA_SUFFIXES


def _open_with_metadata(path: Path) -> dict[str, Any]:
    """Images whose labels stand in metadata.csv or metadata.jsonl, as HF reads them."""
    import datasets

    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=str(path)))
    except datasets.exceptions.DatasetGenerationError as e:
        raise ValueError(
            f"{path}: the images and their metadata file could not be read: {e.__cause__ or e}"
        ) from e


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
    if split_of(first_word) is not None:
        return first_word
    for folder in file.parents:
        if folder.is_relative_to(root) and folder != root and split_of(folder.name) is not None:
            return folder.name.lower()
    return ""
