"""Files that are whole or not there: everything is written under a temporary name and renamed."""

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
    """Write a text file atomically; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(to_plain(data), indent=2) + "\n")


def write_yaml(path: Path, data: Any) -> None:
    write_text(path, yaml.safe_dump(to_plain(data), sort_keys=False, allow_unicode=True))


def to_plain(data: Any) -> Any:
    """Numbers, strings, lists and dicts only; anything else by its repr. Non-finite numbers become strings."""
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
    return (
        data.item()
        if hasattr(data, "item") and getattr(data, "numel", lambda: 1)() == 1
        else repr(data)
    )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error.

    The old folder stays whole until the new one is; `recover` finds it if the machine stops in between.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (
        folder.with_name(f".{folder.name}.tmp"),
        folder.with_name(f".{folder.name}.old"),
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    swap_folders(temporary, folder, old)


def swap_folders(temporary: Path, folder: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Put the old folder back where a machine stopped between the two renames of `replacing_folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.replace(old, folder)
