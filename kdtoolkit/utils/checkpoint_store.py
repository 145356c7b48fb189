"""Writing, copying and loading checkpoints of a run; all ranks call each function."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdtoolkit.utils import distributed
from kdtoolkit.utils.checkpoint import (
    CheckpointError,
    damage_error,
    describe_position,
    read_metadata,
)
from kdtoolkit.utils.checkpoint_files import (
    copy_checkpoint,
    is_whole,
    read_states,
    write_checkpoint,
)
from kdtoolkit.utils.run_state import LOOP, MODEL, HasState, apply_states, collect_states
from kdtoolkit.utils.state_file import DamagedFile
from kdtoolkit.utils.state_tree import UnsupportedState

# What a state that does not fit raises in torch, accelerate or a callback
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "make the folder writable",
}

logger = logging.getLogger(__name__)


def save(
    accelerator: Accelerator, folder: Path, metadata: Mapping[str, Any], loop: HasState
) -> None:
    """Write the state of everything that was prepared by the accelerator, and of the loop.

    Args:
        accelerator: The accelerator of the run.
        folder: Folder of the checkpoint, which replaces an earlier one.
        metadata: What `check_metadata` compares, with "epoch" and "step".
        loop: The training loop.

    Raises:
        CheckpointError: If it could not be written; the previous checkpoint is whole.
    """
    states = collect_states(accelerator, loop)
    _on_main_process(accelerator, folder, lambda: write_checkpoint(folder, states, metadata))


def copy(accelerator: Accelerator, source: Path, target: Path) -> None:
    """Copy a checkpoint, as atomically as `save`.

    Args:
        accelerator: The accelerator of the run.
        source: Folder of the checkpoint.
        target: Folder of the copy, which replaces an earlier one.

    Raises:
        CheckpointError: If it could not be written; an earlier one in `target` is whole.
    """
    _on_main_process(accelerator, target, lambda: copy_checkpoint(source, target))


def _on_main_process(accelerator: Accelerator, folder: Path, write: Callable[[], None]) -> None:
    """Write on the main process; a failure is raised on every rank."""
    failure, cause = "", None
    if accelerator.is_main_process:
        try:
            write()
        except (OSError, DamagedFile, UnsupportedState) as error:
            failure, cause = _describe_failure(folder, error), error
    failure = distributed.broadcast_object(failure, accelerator.device)
    if failure:
        raise CheckpointError(failure) from cause


def _describe_failure(folder: Path, error: Exception) -> str:
    kept = next((k for k in (folder, folder.with_name("last")) if read_metadata(k)), None)
    whole = "there is no earlier one"
    if kept is not None:
        whole = f"{kept} is whole ({describe_position(read_metadata(kept))})"
    if not isinstance(error, OSError):
        return f"could not write checkpoint {folder}: {error}; {whole}"
    reason = error.strerror or str(error)
    remedy = REMEDIES.get(error.errno or 0, "remove the cause")
    return (
        f"could not write checkpoint {folder}: {reason}; {whole}. {remedy.capitalize()} and "
        "continue with resume='auto'"
    )


def load(accelerator: Accelerator, folder: Path, loop: HasState) -> None:
    """Load the state of everything that was prepared, and of the loop.

    Args:
        accelerator: The accelerator of the run.
        folder: Folder of the checkpoint.
        loop: The training loop.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """
    try:
        apply_states(accelerator, read_states(folder), loop)
    except MISFITS as error:
        raise damage_error(folder, error) from error


def read_method(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the weights of the method, and the states of callbacks.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The state of the method; name of a callback -> what its `state_dict` returned.

    Raises:
        CheckpointError: If the checkpoint is damaged.
    """
    try:
        states = read_states(folder, (MODEL, LOOP))
        return states[MODEL], states[LOOP]["loop"]["callbacks"]
    except MISFITS as error:
        raise damage_error(folder, error) from error


def restore(accelerator: Accelerator, source: Path, target: Path) -> None:
    """Copy a checkpoint to a folder that holds no whole one.

    Args:
        accelerator: The accelerator of the run.
        source: Folder of the checkpoint.
        target: Folder of the copy.

    Raises:
        CheckpointError: If it could not be written.
    """
    if source == target:
        return
    if not distributed.broadcast_object(is_whole(target), accelerator.device):
        copy(accelerator, source, target)


def restore_best(
    accelerator: Accelerator, resumed: Path, output_dir: Path | None, best: Mapping[str, Any]
) -> bool:
    """Restore checkpoints/best of the output folder, if it is not that of the best step.

    It is missing or another one where the machine stopped between two writes, or where a run is
    resumed in another folder.

    Args:
        accelerator: The accelerator of the run.
        resumed: Folder of the checkpoint that the run resumes from.
        output_dir: Output folder of the run; None where nothing is written.
        best: "step" of the best evaluation; empty before the first.

    Returns:
        Whether the best checkpoint is there; True where there is none to restore.

    Raises:
        CheckpointError: If it could not be written.
    """
    if output_dir is None or "step" not in best:
        return True
    target = output_dir / "checkpoints" / "best"
    candidates = (target, resumed, resumed.with_name("best"))
    source = next((folder for folder in candidates if is_of_step(folder, best["step"])), None)
    source = distributed.broadcast_object(source, accelerator.device)
    if source is None:
        logger.warning(
            "the checkpoint of the best epoch so far (epoch %s, step %s) is neither in %s nor "
            "beside %s, or it is damaged",
            best.get("epoch", "?"), best["step"], target, resumed,
        )  # fmt: skip
        return False
    if source != target:
        copy(accelerator, source, target)
    return True


def is_of_step(folder: Path, step: int) -> bool:
    """Whether a folder holds a whole checkpoint of a step.

    Args:
        folder: The folder.
        step: Batches since the start of the run.
    """
    return read_metadata(folder).get("step") == step and is_whole(folder)
