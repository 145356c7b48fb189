"""Checkpoints: accelerate's state in one folder, with metadata that says of which run it is.

`save` is atomic: the previous checkpoint stays whole until the new one is. `check_metadata` refuses
a checkpoint of another method, network or loss before anything is changed.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from kdtoolkit.utils.io import atomic_folder, recover_folder, swap_folders, write_json

Metadata: TypeAlias = dict[str, Any]  # plain numbers, strings, lists and dicts, as in JSON

METADATA_FILE = "checkpoint.json"
STATE_FILE = "custom_checkpoint_0.pkl"  # accelerate's name for the first registered object
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
)
# What torch and safetensors raise for a full disk or a broken file.
FILE_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to this run."""


def save(accelerator: Accelerator, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the state of everything that was prepared by, or registered with, the accelerator.

    All ranks call it; rank 0 renames.

    Args:
        accelerator: The accelerator of the run.
        folder: Folder of the checkpoint, which replaces an earlier one.
        metadata: What `check_metadata` compares, with "epoch" and "step".

    Raises:
        CheckpointError: If it could not be written; the previous checkpoint is whole.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / METADATA_FILE, dict(metadata))
            swap_folders(temporary, folder)
        accelerator.wait_for_everyone()
    except FILE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_error(folder, error) from error


def _write_error(folder: Path, error: BaseException) -> CheckpointError:
    kept = "there is no earlier one"
    if folder.exists():
        kept = f"the previous one is whole ({describe_position(read_metadata(folder))})"
    return CheckpointError(
        f"could not write checkpoint {folder}: {error}; {kept}. Free some space and continue with "
        "resume='auto'"
    )


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, as atomically as `save`.

    Args:
        source: Folder of the checkpoint.
        target: Folder of the copy, which replaces an earlier one.

    Raises:
        CheckpointError: If it could not be written; an earlier one in `target` is whole.
    """
    try:
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise _write_error(target, error) from error


def restore_best(
    accelerator: Accelerator,
    resumed: Path,
    output_dir: Path | None,
    best_evaluation: Mapping[str, Any],
) -> None:
    """Restore checkpoints/best of the output folder, if it is not that of the best step.

    It is missing or another one where the machine stopped between two writes, or where a run is
    resumed in another folder. All ranks call it.

    Args:
        accelerator: The accelerator of the run.
        resumed: Folder of the checkpoint that the run resumes from.
        output_dir: Output folder of the run; None where nothing is written.
        best_evaluation: "step" of the best evaluation; empty before the first.

    Raises:
        CheckpointError: If the best checkpoint is not found.
    """
    step = best_evaluation.get("step")
    if output_dir is None or step is None:
        return
    best = output_dir / "checkpoints" / "best"
    if accelerator.is_main_process and read_metadata(best).get("step") != step:
        candidates = (resumed, resumed.with_name("best"))
        source = next((c for c in candidates if read_metadata(c).get("step") == step), None)
        if source is None:
            raise CheckpointError(
                f"the best epoch so far (step {step}) is neither in {best} nor beside {resumed}: "
                "put it there, or start a new run"
            )
        copy(source, best)
    accelerator.wait_for_everyone()


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The metadata; empty where there is no readable checkpoint.
    """
    with contextlib.suppress(OSError, ValueError):
        metadata: Metadata = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        return metadata
    return {}


def describe_position(metadata: Mapping[str, Any]) -> str:
    """Phrase that says where in a run a checkpoint was written.

    Args:
        metadata: Metadata of the checkpoint.

    Returns:
        "epoch 3, step 120", with "?" for what is not known.
    """
    return f"epoch {metadata.get('epoch', '?')}, step {metadata.get('step', '?')}"


def check_metadata(folder: Path, expected: Mapping[str, Any]) -> Metadata:
    """Check that a checkpoint is one of this run.

    Args:
        folder: Folder of the checkpoint.
        expected: Metadata of this run; of its keys those in `MUST_MATCH` are compared.

    Returns:
        Metadata of the checkpoint.

    Raises:
        CheckpointError: If there is no checkpoint, or it differs; the message says in what.
    """
    recover_folder(folder)
    found = read_metadata(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({METADATA_FILE} is missing); start without resume, or "
            "give its folder"
        )
    keys = [key for key in MUST_MATCH if key in expected]
    wrong = [key for key in keys if found.get(key) != expected[key]]
    if wrong:
        differences = "; ".join(
            f"{key}: {found.get(key)!r} there, {expected[key]!r} now" for key in wrong
        )
        raise CheckpointError(
            f"{folder} is a checkpoint of another run: {differences}. Use its settings, another "
            "output_dir, or overwrite=True"
        )
    return found


def load(accelerator: Accelerator, folder: Path) -> None:
    """Load the state of everything that was prepared or registered.

    Args:
        accelerator: The accelerator of the run.
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged or does not fit.
    """
    try:
        accelerator.load_state(str(folder))
    except FILE_ERRORS as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}; give another checkpoint (resume=PATH), or start "
            "a new run with overwrite=True"
        ) from error


def callback_states(folder: Path) -> dict[str, Any]:
    """State of every callback of the run, by its name.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        What `Callback.state_dict` returned when the checkpoint was written.
    """
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    callbacks: dict[str, Any] = state["callbacks"]
    return callbacks


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load only the weights of the method, for instance of the best epoch.

    Args:
        module: The method.
        folder: Folder of the checkpoint.
    """
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    stored: dict[str, Tensor]
    if path.exists():
        stored = load_file(path)
    else:
        stored = torch.load(folder / "pytorch_model.bin", map_location="cpu")
    module.load_state_dict(_with_tied_tensors(module, stored))


def _with_tied_tensors(module: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """All entries of a state_dict; of tied tensors the file holds one."""
    own = module.state_dict(keep_vars=True)
    by_identity = {id(own[key]): tensor for key, tensor in stored.items() if key in own}
    known = {key: by_identity[id(own[key])] for key in own if id(own[key]) in by_identity}
    return known | stored
