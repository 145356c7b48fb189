"""The output folder of a run: whether it may be used, where to resume from, and clearing it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeAlias

from kdtoolkit.utils.checkpoint import describe_position, read_metadata
from kdtoolkit.utils.io import recover_folder

Resume: TypeAlias = bool | str | os.PathLike[str]

# What a run writes; a run that overwrites it clears them.
FOLDERS = ("checkpoints", "student", "networks", "figures", "baseline", "finetuned")
FILES = ("config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md")
# Folders that may be there before the run itself writes anything.
PREPARED_FOLDERS = ("baseline", "finetuned", "teacher")


class OutputDirNotEmpty(ValueError):
    """The output folder holds another run or other files."""


def claim_output_dir(folder: Path | None, resume: Resume, overwrite: bool) -> Path | None:
    """Check that a run may write to a folder, and find the checkpoint to resume from.

    Nothing is changed, except that a checkpoint is recovered that a crash left between two renames.

    Args:
        folder: Output folder of the run; None where nothing is written.
        resume: False; True to resume from checkpoints/last; "auto" to resume where there is one; or
            the folder of a checkpoint.
        overwrite: Whether what the folder holds may be overwritten.

    Returns:
        Folder of the checkpoint to resume from, or None for a new run.

    Raises:
        OutputDirNotEmpty: If the folder holds something, and neither `resume` nor `overwrite`
            allows that.
        ValueError: If `resume` names nothing to resume from, or the folder is a file.
    """
    if folder is None:
        if resume:
            raise ValueError(
                f"resume={resume!r} needs output_dir, the folder of the run to continue"
            )
        return None
    last = folder / "checkpoints" / "last"
    recover_folder(last)
    source = None
    if isinstance(resume, (str, os.PathLike)) and resume != "auto":
        source = _checkpoint_folder(resume, last)
        if source.resolve().is_relative_to(folder.resolve()):
            return source
    elif resume and last.exists():
        return last
    if resume is True:
        raise ValueError(
            f"resume=True, but {last} does not exist; resume='auto' starts a new run where there "
            "is none"
        )
    _check_folder_is_free(folder, last, resume, overwrite)
    return source


def _checkpoint_folder(resume: str | os.PathLike[str], last: Path) -> Path:
    source = Path(resume)
    if not source.is_dir():
        raise ValueError(
            f"resume={str(resume)!r} is no folder: give a checkpoint such as {last}, or 'auto'"
        )
    return source


def _check_folder_is_free(folder: Path, last: Path, resume: Resume, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: give a folder")
    stopped_early = resume == "auto" and not (folder / "checkpoints").exists()
    if overwrite or stopped_early or not _is_used(folder):
        return
    holds = "other files"
    if last.exists():
        holds = f"checkpoints/last ({describe_position(read_metadata(last))})"
    raise OutputDirNotEmpty(
        f"{folder} holds {holds}: pass resume='auto' or overwrite=True, or another output_dir"
    )


def _is_used(folder: Path) -> bool:
    return folder.exists() and any(p.name not in PREPARED_FOLDERS for p in folder.iterdir())


def clear_output_dir(folder: Path) -> None:
    """Delete what an earlier run wrote, its baseline and its fine-tuned teacher included.

    Other files in the folder stay.

    Args:
        folder: Output folder of the run.
    """
    if not _is_used(folder):
        return
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
