"""Checkpoints: accelerate's state in one folder, with a card that says of which run it is.

`save` is atomic: the previous checkpoint stays whole until the new one is. `load` refuses a checkpoint of another method,
network or loss before it touches anything.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .files import recover, replacing_folder, swap, write_json

CARD = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


def save(accelerator: Accelerator, folder: Path, card: dict[str, Any]) -> None:
    """Write the state of everything that was prepared or registered. All ranks call it, rank 0 renames."""
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / CARD, card)
            swap(temporary, folder, old)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, ValueError) as error:  # torch and safetensors report a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        kept = (
            f"the previous checkpoint {folder} is whole ({where(read_card(folder))})" if folder.exists() else "none yet"
        )
        raise CheckpointError(
            f"could not write checkpoint {folder}: {error}. {kept}. Free some space and go on with resume='auto'"
        ) from error


def copy(source: Path, target: Path) -> None:
    """A second checkpoint, as atomic as the first."""
    with replacing_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    return json.loads(path.read_text()) if path.exists() else {}


def where(card: dict[str, Any]) -> str:
    return f"epoch {card.get('epoch', '?')}, step {card.get('step', '?')}"


def check(folder: Path, card: dict[str, Any]) -> dict[str, Any]:
    """The card of `folder`, if it fits this run; else CheckpointError with what differs."""
    recover(folder)
    found = read_card(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({CARD} is missing); start without resume, or give its folder"
        )
    keys = ("method", "losses", "networks", "seed", "total_steps", "batch_size", "optimizer")
    wrong = [f"{k}: {found.get(k)!r} there, {card[k]!r} now" for k in keys if k in card and found.get(k) != card[k]]
    if wrong:
        raise CheckpointError(
            f"{folder} is a checkpoint of another run: {'; '.join(wrong)}. Use its settings, another output_dir, or overwrite=True"
        )
    return found


def load(accelerator: Accelerator, folder: Path) -> None:
    """Give every prepared and registered object its state back."""
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, ValueError, OSError, KeyError, EOFError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error


def load_weights(module: nn.Module, folder: Path) -> None:
    """Only the weights of the method, for instance of the best epoch."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    state = load_file(path) if path.exists() else torch.load(folder / "pytorch_model.bin", map_location="cpu")
    module.load_state_dict(state)
