"""Checkpoints of a run: which one to continue from, and whether it fits and is whole.

A checkpoint is a folder, see `checkpoint_files`; `checkpoint_store` writes and loads it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtoolkit.utils.checkpoint_files import (
    Metadata,
    OtherVersion,
    check_files,
    is_whole,
    read_checked_metadata,
)
from kdtoolkit.utils.io import old_name, recover_folder, to_plain
from kdtoolkit.utils.state_file import DamagedFile

logger = logging.getLogger(__name__)

MUST_MATCH = (
    "method",
    "losses",
    "networks",
    "options",
    "callbacks",
    "seed",
    "total_steps",
    "batch_size",
    "optimizer",
    "training",
    "data",
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, or does not belong to this run."""


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The metadata; empty where there is no readable checkpoint.
    """
    try:
        return read_checked_metadata(folder)
    except DamagedFile:
        return {}


def describe_position(metadata: Mapping[str, Any]) -> str:
    """Phrase that says where in a run a checkpoint was written.

    Args:
        metadata: Metadata of the checkpoint.

    Returns:
        "epoch 3, step 120", with "?" for what is not known.
    """
    return f"epoch {metadata.get('epoch', '?')}, step {metadata.get('step', '?')}"


def find_checkpoint(checkpoints: Path, *, or_best: bool = True) -> Path | None:
    """Find the checkpoint from which a run continues: the last one, or else the best one.

    A checkpoint is recovered that a crash left between two renames; nothing else is changed.

    Args:
        checkpoints: The folder `checkpoints/` of a run; it may be missing.
        or_best: Whether to take `best`, with a warning, where `last` is missing or damaged; else
            the error offers it.

    Returns:
        `last` or `best`; None where no checkpoint was ever complete.

    Raises:
        CheckpointError: If there are checkpoints, and none can be taken.
    """
    last, best = checkpoints / "last", checkpoints / "best"
    recover_folder(last)
    recover_folder(best)
    problem = f"{last} is missing"
    if last.exists():
        try:
            check_files(last)
        except OtherVersion as error:
            raise damage_error(last, error) from error
        except DamagedFile as error:
            problem = str(error)
        else:
            return last
    if or_best and is_whole(best):
        position = describe_position(read_metadata(best))
        logger.warning("%s: the run continues from %s (%s)", problem, best, position)
        return best
    if not last.exists() and not best.exists():
        return None
    raise damage_error(last, DamagedFile(problem))


def damage_error(folder: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint that cannot be read; it offers another one that is whole.

    Args:
        folder: Folder of the checkpoint.
        error: What is wrong with it.
    """
    last = folder.with_name("last")
    others = (last, old_name(last), folder.with_name("best"))
    whole = next((other for other in others if other != folder and is_whole(other)), None)
    advice = (
        "no other checkpoint beside it is whole: start a new run, with another output_dir or with "
        "overwrite=True and without resume"
    )
    if whole is not None:
        position = describe_position(read_metadata(whole))
        advice = f"{whole} is whole ({position}): continue from it with resume={str(whole)!r}"
    return CheckpointError(f"{folder} cannot be loaded: {error}; {advice}")


def check_metadata(folder: Path, expected: Mapping[str, Any]) -> Metadata:
    """Check that a checkpoint is one of this run, and whole.

    Args:
        folder: Folder of the checkpoint.
        expected: Metadata of this run; of its keys those in `MUST_MATCH` are compared.

    Returns:
        Metadata of the checkpoint.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, or it differs; the message says
            in what.
    """
    recover_folder(folder)
    try:
        found = check_files(folder)
    except DamagedFile as error:
        raise damage_error(folder, error) from error
    check_settings(found, expected, f"{folder} is a checkpoint of another run")
    return found


def check_settings(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Check that two runs have the same settings.

    Args:
        found: Settings of the earlier run.
        expected: Settings of this run; of their keys those in `MUST_MATCH` are compared.
        what: What the earlier ones are of, for the message.

    Raises:
        CheckpointError: If they differ; the message says in what.
    """
    keys = [key for key in MUST_MATCH if key in expected]
    differences = [text for key in keys for text in _differences(key, found, expected)]
    if differences:
        raise CheckpointError(
            f"{what}: {'; '.join(differences)}. Use its settings, another output_dir, or "
            "overwrite=True without resume"
        )


def _differences(key: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs under a key; of two mappings only the entries that do."""
    there, now = found.get(key), to_plain(expected.get(key))
    if there == now:
        return []
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        entries = dict.fromkeys([*there, *now])
        return [f"{key}: {text}" for name in entries for text in _differences(name, there, now)]
    return [f"{key}: {there!r} there, {now!r} now"]
