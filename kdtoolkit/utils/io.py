"""Files that are whole or not there: they are written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
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
    old = _old_name(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Restore the old folder where a machine stopped between the two renames of `swap_folders`.

    Args:
        folder: Final name of the folder.
    """
    old = _old_name(folder)
    if old.exists() and not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.replace(old, folder)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
