"""A model into a folder that timm loads."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from kdtoolkit.features.preprocess import config_of
from kdtoolkit.models.describe import class_name

READ_BY_TIMM = (
    "in_chans",
    "global_pool",
    "img_size",
)  # timm that records arguments reads these off the model itself


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    model_args: dict[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Path:
    """Writes model.safetensors and config.json, so that timm.create_model("local-dir:FOLDER", pretrained=True) agrees.

    model_args  constructor options to write; default: those that build() or the network recorded
    input_size  (channels, H, W) of the images it was trained on, for `timm.data.resolve_data_config`
    A new folder appears at once; in a folder that exists, the two files are replaced and others stay.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        draft = Path(work, folder.name)
        with _trained_on(model, input_size):
            _write(model, draft, _recorded(model) if model_args is None else model_args)
        if not folder.exists():
            draft.rename(folder)
            return folder
        for file in draft.iterdir():
            os.replace(file, folder / file.name)
    return folder


@contextlib.contextmanager
def _trained_on(model: nn.Module, input_size: tuple[int, int, int] | None) -> Iterator[None]:
    """The model's configuration with another input size, as long as it is written."""
    own, cfg = getattr(model, "pretrained_cfg", None), config_of(model)
    if input_size is None or not cfg:
        yield
        return
    try:
        model.pretrained_cfg = cfg | {"input_size": tuple(input_size), "crop_pct": 1.0}  # type: ignore[assignment]
        yield
    finally:
        model.pretrained_cfg = own  # type: ignore[assignment]


def _recorded(model: nn.Module) -> dict[str, Any]:
    args = getattr(model, "kd_model_args", {})
    return {
        k: v for k, v in args.items() if not (hasattr(model, "_model_args") and k in READ_BY_TIMM)
    }


def _write(model: nn.Module, folder: Path, model_args: dict[str, Any]) -> None:
    hook = model.register_state_dict_post_hook(_plain)
    try:
        if config_of(model).get("architecture"):
            save_for_hf(model, str(folder), model_args=dict(model_args), safe_serialization=True)
            return
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    finally:
        hook.remove()
    config = {
        "architecture": None,
        "class": class_name(model),
        "model_args": {k: repr(v) for k, v in model_args.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _plain(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """safetensors refuses channels_last and shared tensors: own, contiguous copies on the CPU."""
    for key, value in state.items():
        state[key] = value.detach().to("cpu", copy=True).contiguous()
