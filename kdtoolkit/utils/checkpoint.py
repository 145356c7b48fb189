"""Checkpoints: accelerate's state in one folder, with a card that says of which run it is.

`save` is atomic: the previous checkpoint stays whole until the new one is. `check` refuses a checkpoint of another
method, network or loss before anything is touched.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from kdtoolkit.utils.io import atomic_folder, recover_folder, swap_folders, write_json

METADATA_FILE = "checkpoint.json"
FOLDERS = ("checkpoints", "student", "networks", "figures", "baseline", "finetuned")
FILES = ("config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md")
BROKEN = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


class OutputDirNotEmpty(ValueError):
    """The output folder holds something else."""


def save(accelerator: Accelerator, folder: Path, card: dict[str, Any]) -> None:
    """Write the state of everything that was prepared or registered. All ranks call it, rank 0 renames."""
    temporary, old = (
        folder.with_name(f".{folder.name}.tmp"),
        folder.with_name(f".{folder.name}.old"),
    )
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / METADATA_FILE, card)
            swap_folders(temporary, folder, old)
        accelerator.wait_for_everyone()
    except (
        BROKEN
    ) as error:  # a full disk is a RuntimeError of torch and an error of its own in safetensors
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(folder, error) from error


def _not_written(folder: Path, error: BaseException) -> CheckpointError:
    kept = "there is no earlier one"
    if folder.exists():
        kept = f"the previous one is whole ({describe_position(read_metadata(folder))})"
    return CheckpointError(
        f"could not write checkpoint {folder}: {error}; {kept}. Free some space and go on with resume='auto'"
    )


def copy(source: Path, target: Path) -> None:
    """A second checkpoint, as atomic as the first."""
    try:
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise _not_written(target, error) from error


def restore_best(
    accelerator: Accelerator, resumed: Path, output_dir: Path | None, best_at: dict[str, float]
) -> None:
    """checkpoints/best of `output_dir` is that of the best step again, where the machine stopped between two writes or
    the run goes on in another folder."""
    step = best_at.get("step")
    if output_dir is None or step is None:
        return
    best = output_dir / "checkpoints" / "best"
    if accelerator.is_main_process and read_metadata(best).get("step") != step:
        for source in (resumed, resumed.with_name("best")):
            if read_metadata(source).get("step") == step:
                copy(source, best)
                break
        else:
            raise CheckpointError(
                f"the best epoch so far (step {step}) is neither in {best} nor beside {resumed}: "
                "put it there, or start anew"
            )
    accelerator.wait_for_everyone()


def claim_output_dir(folder: Path | None, resume: Any, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any; ValueError where `folder` is not free. Nothing is changed."""
    if folder is None:
        if resume:
            raise ValueError(
                f"resume={resume!r} needs output_dir, the folder of the run to go on with"
            )
        return None
    last = folder / "checkpoints" / "last"
    recover_folder(last)
    source = None
    if isinstance(resume, (str, os.PathLike)) and resume != "auto":
        source = Path(resume)
        if not source.is_dir():
            raise ValueError(
                f"resume={str(resume)!r} is no folder: give a checkpoint such as {last}, or 'auto'"
            )
        if source.resolve().is_relative_to(folder.resolve()):
            return source
    elif resume and last.exists():
        return last
    if resume is True:
        raise ValueError(
            f"resume=True, but {last} does not exist; resume='auto' starts anew where there is none"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: give a folder")
    begun = resume == "auto" and not (folder / "checkpoints").exists()
    if _used(folder) and not overwrite and not begun:
        holds = (
            f"checkpoints/last ({describe_position(read_metadata(last))})"
            if last.exists()
            else "other files"
        )
        raise OutputDirNotEmpty(
            f"{folder} holds {holds}: pass resume='auto' or overwrite=True, or another output_dir"
        )
    return source


def _used(folder: Path) -> bool:
    return folder.exists() and any(
        p.name not in ("baseline", "finetuned", "teacher") for p in folder.iterdir()
    )


def clear_output_dir(folder: Path) -> None:
    """Take away what an earlier run wrote; also its baseline and its finetuned teacher."""
    if not _used(folder):
        return
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def describe_position(card: dict[str, Any]) -> str:
    return f"epoch {card.get('epoch', '?')}, step {card.get('step', '?')}"


def check_metadata(folder: Path, card: dict[str, Any]) -> dict[str, Any]:
    """The card of `folder`, if it fits this run; else CheckpointError with what differs."""
    recover_folder(folder)
    found = read_metadata(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({METADATA_FILE} is missing); start without resume, or give its folder"
        )
    keys = (
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
    wrong = [
        f"{k}: {found.get(k)!r} there, {card[k]!r} now"
        for k in keys
        if k in card and found.get(k) != card[k]
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} is a checkpoint of another run: {'; '.join(wrong)}. Use its settings, another output_dir, "
            "or overwrite=True"
        )
    return found


def load(accelerator: Accelerator, folder: Path) -> None:
    """Give every prepared and registered object its state back."""
    try:
        accelerator.load_state(str(folder))
    except BROKEN as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}; give another checkpoint (resume=PATH), or start anew with "
            "overwrite=True"
        ) from error


def callback_states(folder: Path) -> dict[str, Any]:
    """{name: state} of the callbacks of a run, as its checkpoint holds them."""
    return torch.load(folder / "custom_checkpoint_0.pkl", map_location="cpu", weights_only=True)[
        "callbacks"
    ]


def load_weights(module: nn.Module, folder: Path) -> None:
    """Only the weights of the method, for instance of the best epoch."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    state = (
        load_file(path)
        if path.exists()
        else torch.load(folder / "pytorch_model.bin", map_location="cpu")
    )
    own = module.state_dict(keep_vars=True)
    held = {
        id(own[key]): state[key] for key in state if key in own
    }  # of tied tensors the file holds one
    module.load_state_dict({key: held[id(v)] for key, v in own.items() if id(v) in held} | state)
