"""A run that another one replaces: it goes only when the new one has its first checkpoint.

What the new run would write before that, the texts and the checkpoints, is set aside by renaming;
student/, networks/, figures/ and report.md stay where they are. `recover` restores the earlier run
where the new one ended without a checkpoint, also after the process was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from kdtoolkit.utils.folder_lock import STATE_FOLDER
from kdtoolkit.utils.manifest import (
    ADDED_TO,
    MANIFEST_FILE,
    TEXT_FILES,
    WRITTEN,
    Manifest,
    matches,
    read_manifest,
    remove_empty_folders,
    remove_files,
    walk_files,
)

PREVIOUS = "previous"  # folder in the state folder
WRITTEN_EARLY = (
    *(name for name in TEXT_FILES if name not in ("report.md", "finetuned.json")),
    "checkpoints/last/**",
    "checkpoints/best/**",
    "checkpoints/.*/**",
)


def set_aside(old: Manifest) -> Manifest:
    """Make room for a new run.

    Args:
        old: Manifest of the run that is replaced.

    Returns:
        Manifest of the new run, which is written.

    Raises:
        OSError: If a file could not be renamed or written; `recover` restores what was there.
    """
    folder, previous = old.folder, _previous(old.folder)
    old.settle()
    old.folder = previous
    old.write()
    old.folder = folder
    for path in sorted(old.files):
        if matches(path, WRITTEN_EARLY):
            _move(folder / path, previous / "files" / path)
    remove_empty_folders(folder, ("checkpoints/last", "checkpoints/best", "checkpoints"))
    new = Manifest(folder, replacing=True)
    new.claim_names()
    new.foreign -= old.files
    new.write()
    return new


def recover(folder: Path) -> None:
    """Finish or undo the replacement of a run, where one was begun.

    Args:
        folder: Folder of the runs, which may not exist.
    """
    if not _previous(folder).is_dir():
        return
    now = read_manifest(folder)
    if now is not None and now.replacing and has_checkpoint(folder):
        remove_previous(now)
    else:
        _restore(folder, now)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has written its first checkpoint.

    Args:
        folder: Folder of the run.
    """
    return (folder / "checkpoints" / "last" / "checkpoint.json").is_file()


def remove_previous(new: Manifest) -> None:
    """Remove the run that was set aside; the new one has its first checkpoint.

    Args:
        new: Manifest of the new run, which is written.
    """
    previous = _previous(new.folder)
    old = read_manifest(previous) if previous.is_dir() else None
    if old is not None:
        stayed = {path for path in old.files if not matches(path, WRITTEN_EARLY)}
        remove_files(new.folder, stayed)
        for run in sorted(old.runs - new.runs):
            remove_run(new.folder / run)
            remove_empty_folders(new.folder, (run, run.partition("/")[0]))
    new.replacing = False
    new.write()
    shutil.rmtree(previous, ignore_errors=True)


def remove_run(folder: Path) -> None:
    """Remove what a run wrote, and its folder if nothing else is in it.

    Args:
        folder: Folder of the run.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for run in manifest.runs:
        remove_run(folder / run)
    remove_files(folder, manifest.present())
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    remove_empty_folders(folder.parent, (folder.name,))


def _restore(folder: Path, now: Manifest | None) -> None:
    """Put the earlier run back. That works on a full disk: files are renamed, not written."""
    previous = _previous(folder)
    old = read_manifest(previous)
    if old is not None and now is not None and now.replacing:
        if now.runs - old.runs:
            old.runs |= now.runs
            with contextlib.suppress(OSError):
                old.write()
        stayed = {path for path in old.files if not matches(path, WRITTEN_EARLY)}
        new_files = (p for p in walk_files(folder) if matches(p, (*WRITTEN, *ADDED_TO)))
        remove_files(folder, [p for p in new_files if p not in stayed | now.foreign])
        own = folder / STATE_FOLDER / MANIFEST_FILE
        os.replace(previous / STATE_FOLDER / MANIFEST_FILE, own)  # from here on it is undone
    files = previous / "files"
    for path in sorted(walk_files(files)):
        _move(files / path, folder / path)
    shutil.rmtree(previous, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _previous(folder: Path) -> Path:
    return folder / STATE_FOLDER / PREVIOUS


def holds_state(folder: Path) -> bool:
    """Whether the toolkit knows anything of a folder, beside who holds its lock.

    Args:
        folder: Folder of a run, or any other.
    """
    return (folder / STATE_FOLDER / MANIFEST_FILE).exists() or _previous(folder).exists()
