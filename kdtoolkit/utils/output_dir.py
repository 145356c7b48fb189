"""The output folder of a run: whether it may be used, and where to resume from."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kdtoolkit.utils import previous_run
from kdtoolkit.utils.checkpoint import describe_position, find_checkpoint, read_metadata
from kdtoolkit.utils.folder_lock import OutputDirInUse, check_not_in_use
from kdtoolkit.utils.manifest import Manifest, foreign_files, is_in_the_way, read_manifest

Resume: TypeAlias = bool | str | os.PathLike[str] | None
# "restart": an earlier start that has no checkpoint yet is begun again
Action: TypeAlias = Literal["new", "resume", "replace", "restart", "finished"]

SHOWN = 3  # files that a message names

__all__ = ["Claim", "OutputDirInUse", "OutputDirNotEmpty", "claim_output_dir"]


class OutputDirNotEmpty(ValueError):
    """The output folder holds another run or other files."""


@dataclass(frozen=True)
class Claim:
    """What a run does with its output folder.

    Attributes:
        folder: The folder; None where nothing is written.
        action: "new" run, "resume" from a checkpoint, "replace" an earlier run, "restart" one that
            has no checkpoint, or nothing because it is "finished".
        resume_from: Folder of the checkpoint to resume from; None for a run from the start.
    """

    folder: Path | None
    action: Action = "new"
    resume_from: Path | None = None


def claim_output_dir(folder: Path | None, resume: Resume, overwrite: bool) -> Claim:
    """Check that a run may write to a folder, and find the checkpoint to resume from.

    Nothing is changed, except that what a killed run left half done is finished or undone.

    Args:
        folder: Output folder of the run; None where nothing is written.
        resume: False; True to resume from checkpoints/last; "auto" to resume where there is one; or
            the folder of a checkpoint.
        overwrite: Whether an earlier run in the folder may be replaced.

    Returns:
        What is to be done.

    Raises:
        OutputDirNotEmpty: If the folder holds something, and neither `resume` nor `overwrite`
            allows that.
        OutputDirInUse: If another run is writing to it.
        ValueError: If `resume` names nothing to resume from, or the folder cannot be made or read.
    """
    if folder is None:
        if resume:
            raise ValueError(
                f"resume={resume!r} needs output_dir, the folder of the run to continue"
            )
        return Claim(None)
    try:
        _check_can_be_made(folder)
        check_not_in_use(folder)
        return choose_action(folder, resume, overwrite)
    except OSError as error:
        raise ValueError(
            f"output_dir {folder} cannot be used: {error.strerror or error} "
            f"({error.filename or folder}); check its permissions, or give another output_dir"
        ) from error


def _check_can_be_made(folder: Path) -> None:
    there = folder
    while not there.exists():
        if there.is_symlink():
            raise ValueError(f"output_dir {folder}: {there} is a link to what does not exist")
        there = there.parent
    if not there.is_dir():
        what = "is a file" if there == folder else f"cannot be made: {there} is a file"
        raise ValueError(f"output_dir {folder} {what}; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        what = "be written to" if there == folder else f"be made in {there}"
        raise ValueError(
            f"output_dir {folder} cannot {what}: no permission, or a file system for reading only; "
            "give another output_dir"
        )


def choose_action(folder: Path, resume: Resume, overwrite: bool) -> Claim:
    """What a run does with a folder that it may write to; see `claim_output_dir`.

    Args:
        folder: Output folder of the run.
        resume: As in `claim_output_dir`.
        overwrite: As in `claim_output_dir`.
    """
    previous_run.recover(folder)
    manifest = read_manifest(folder)
    source = None
    if isinstance(resume, (str, os.PathLike)) and resume != "auto":
        source = _checkpoint_folder(resume, folder)
        if manifest is not None and source.resolve().is_relative_to(folder.resolve()):
            _check_names_are_free(folder, manifest)
            return Claim(folder, "resume", source)
    elif resume and manifest is not None:
        claim = _continue(folder, manifest, resume)
        if claim is not None:
            _check_names_are_free(folder, manifest)
            return claim
    elif resume is True:
        raise ValueError(
            f"resume=True, but {folder / 'checkpoints' / 'last'} does not exist, and the folder "
            "holds no run; resume='auto' starts a new run where there is none"
        )
    if not overwrite:
        _check_is_free(folder, manifest)
    _check_names_are_free(folder, manifest)
    return Claim(folder, "new" if manifest is None else "replace", source)


def _checkpoint_folder(resume: str | os.PathLike[str], folder: Path) -> Path:
    source = Path(resume)
    example = folder / "checkpoints" / "last"
    if not source.is_dir():
        raise ValueError(
            f"resume={str(resume)!r} is no folder: give a checkpoint such as {example}, or 'auto'"
        )
    of_run = source / "checkpoints" / "last"
    return of_run if not (source / "checkpoint.json").exists() and of_run.is_dir() else source


def _continue(folder: Path, manifest: Manifest, resume: Resume) -> Claim | None:
    """Go on with the run in the folder, or begin it again; None where the folder is to be free."""
    found = find_checkpoint(folder / "checkpoints", or_best=resume == "auto")
    if found is not None:
        return Claim(folder, "resume", found)
    if manifest.finished:
        if not manifest.settings:
            raise OutputDirNotEmpty(
                f"{folder} holds a finished run of an earlier version without checkpoints, so its "
                "settings cannot be compared: use its student/, or give another output_dir, or "
                "overwrite=True without resume"
            )
        return Claim(folder, "finished")
    if resume is True:
        raise ValueError(
            f"resume=True, but {folder / 'checkpoints' / 'last'} does not exist: the run stopped "
            "before its first checkpoint; resume='auto' starts it again"
        )
    return Claim(folder, "restart")


def _check_is_free(folder: Path, manifest: Manifest | None) -> None:
    last = folder / "checkpoints" / "last"
    if manifest is not None:
        holds = "an unfinished run without a checkpoint"
        if last.exists():
            holds = f"checkpoints/last ({describe_position(read_metadata(last))})"
        elif manifest.finished:
            holds = "a finished run"
        raise OutputDirNotEmpty(
            f"{folder} holds {holds}: pass resume='auto' or overwrite=True, or another output_dir"
        )
    found = list(itertools.islice(foreign_files(folder, None), SHOWN + 1))
    if found:
        raise OutputDirNotEmpty(
            f"{folder} holds other files ({_names(found)}) and no run to go on with with "
            "resume='auto': give another output_dir, or overwrite=True, which leaves these files "
            "where they are"
        )


def _check_names_are_free(folder: Path, manifest: Manifest | None) -> None:
    """Refuse to write over files that are not those of the run in the folder."""
    foreign = foreign_files(folder, manifest)
    taken = (path for path in foreign if is_in_the_way(folder, path))
    found = list(itertools.islice(taken, SHOWN + 1))
    if found:
        raise OutputDirNotEmpty(
            f"{folder} holds files that no run wrote, and which this one would write over: "
            f"{_names(found)}; move them away, or give another output_dir"
        )


def _names(paths: list[str]) -> str:
    more = ", ..." if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
