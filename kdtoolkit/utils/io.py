"""Files that are whole or not there: they are written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; parent folders are made.

    Args:
        path: The file, which is replaced if it exists.
        text: Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    """Write a JSON file atomically; `to_plain` converts what JSON does not know.

    Args:
        path: The file, which is replaced if it exists.
        data: Its content.
    """
    write_text(path, json.dumps(to_plain(data), indent=2) + "\n")


def write_yaml(path: Path, data: object) -> None:
    """Write a YAML file atomically; `to_plain` converts what YAML does not know.

    Args:
        path: The file, which is replaced if it exists.
        data: Its content.
    """
    write_text(path, yaml.safe_dump(to_plain(data), sort_keys=False, allow_unicode=True))


def to_plain(data: object) -> Any:
    """Convert data to numbers, strings, lists and dicts.

    Args:
        data: Anything.

    Returns:
        The same in plain types, as JSON has them: a path and a number that is not finite as a
        string, a tensor or an array of one element as a number, anything else as its repr.
    """
    if isinstance(data, dict):
        return {str(k): to_plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [to_plain(v) for v in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, Path):
        return str(data)
    item = getattr(data, "item", None)
    if item is None or math.prod(getattr(data, "shape", ())) != 1:
        return repr(data)
    return item()


def apply_umask(path: Path) -> None:
    """Give a file, or all files of a folder, the mode that a new file has there.

    Libraries that write through a temporary file leave mode 0600, whatever the umask.

    Args:
        path: The file or folder. What is not a plain file stays as it is.
    """
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    probe = (path if path.is_dir() else path.parent) / f".{path.name}.mode"
    try:
        with probe.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file_path in files:
        file_path.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk.

    Args:
        folder: The folder; folders in it are not looked into.

    Raises:
        OSError: If a file could not be written, for instance because the disk is full.
    """
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb" if os.name == "posix" else "rb+") as opened:
                os.fsync(opened.fileno())
    _sync_names(folder)


def _sync_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # systems and file systems that cannot do it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context in which a folder is written that replaces another one at the end.

    The old folder stays whole until the new one is. `recover_folder` restores it if the machine
    stops between the two renames.

    Args:
        folder: The folder, which is replaced if it exists.

    Yields:
        A temporary folder to write to; it is deleted where the block raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    swap_folders(temporary, folder)


def swap_folders(temporary: Path, folder: Path) -> None:
    """Rename a temporary folder to its final name, and delete the old folder.

    Args:
        temporary: The complete new folder.
        folder: Its final name.
    """
    old = old_name(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Restore the old folder where a machine stopped between the two renames of `swap_folders`.

    Args:
        folder: Final name of the folder.
    """
    old = old_name(folder)
    if old.exists() and not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.replace(old, folder)


def old_name(folder: Path) -> Path:
    """Name of the old folder while `swap_folders` puts a new one in its place.

    Args:
        folder: Final name of the folder.
    """
    return folder.with_name(f".{folder.name}.old")
