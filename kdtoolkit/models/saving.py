"""A model into a folder that timm loads."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.describe import class_name
from kdtoolkit.utils.io import apply_umask

# A timm that records arguments reads these from the model itself
READ_BY_TIMM = ("in_chans", "global_pool", "img_size")


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    model_args: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Path:
    """Write a model as `model.safetensors` and `config.json`, the files that timm loads.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` then gives equal logits. A new folder
    appears at once, complete; in a folder that exists the two files are replaced and others stay.

    Args:
        model: The model. One that is not timm's is written too, but timm cannot build it.
        folder: Where to write.
        model_args: Arguments of the constructor to write. None takes those that `load_model` or the
            model itself recorded.
        input_size: (channels, H, W) in pixels of the images that it was trained on, for
            `timm.data.resolve_data_config`. None keeps what its configuration says.

    Returns:
        The folder.

    Example:
        ```python
        save_model(student, "out/student")
        student = load_model("out/student")
        ```
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary, folder.name)
        with _with_input_size(model, input_size):
            _write(model, draft, _recorded_args(model) if model_args is None else model_args)
        apply_umask(draft)
        if not folder.exists():
            draft.rename(folder)
            return folder
        for file in draft.iterdir():
            file.replace(folder / file.name)
    return folder


@contextlib.contextmanager
def _with_input_size(model: nn.Module, size: tuple[int, int, int] | None) -> Iterator[None]:
    """Give the model's configuration another input size while it is written."""
    config = get_pretrained_cfg(model)
    if size is None or not config:
        yield
        return
    original = model.pretrained_cfg
    try:
        model.pretrained_cfg = {**config, "input_size": tuple(size), "crop_pct": 1.0}  # type: ignore[assignment]
        yield
    finally:
        model.pretrained_cfg = original


def _recorded_args(model: nn.Module) -> dict[str, Any]:
    args: dict[str, Any] = dict(getattr(model, "kd_model_args", {}))
    if hasattr(model, "_model_args"):
        return {key: value for key, value in args.items() if key not in READ_BY_TIMM}
    return args


def _write(model: nn.Module, folder: Path, model_args: Mapping[str, Any]) -> None:
    hook = model.register_state_dict_post_hook(_make_contiguous)  # type: ignore[no-untyped-call]
    try:
        if get_pretrained_cfg(model).get("architecture"):
            save_for_hf(model, str(folder), model_args=dict(model_args), safe_serialization=True)
            return
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    finally:
        hook.remove()
    config = {
        "architecture": None,
        "class": class_name(model),
        "model_args": {key: repr(value) for key, value in model_args.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _make_contiguous(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Copy each tensor to the CPU: safetensors refuses channels_last and shared tensors."""
    for key, value in state.items():
        state[key] = value.detach().to("cpu", copy=True).contiguous()
