"""A model into a folder that timm loads."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.describe import class_name
from kdtoolkit.utils.io import apply_umask
from kdtoolkit.utils.paths import expand_home

# A timm that records arguments reads these from the model itself
READ_BY_TIMM = ("in_chans", "global_pool", "img_size")
# What timm's `create_transform` takes
DATA_KEYS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    model_args: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
    data_config: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
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
        data_config: What its images are made by, for the same function: input_size, mean, std,
            crop_pct, crop_mode and interpolation. What is left out is kept.
        label_names: Names of the classes by class id. None keeps what its configuration says.

    Returns:
        The folder.

    Raises:
        OSError: If the folder cannot be written to, for instance because the disk is full; a model
            that was there before is whole.

    Example:
        ```python
        save_model(student, "out/student")
        student = load_model("out/student")
        ```
    """
    folder = Path(expand_home(os.fspath(folder)))
    args = _recorded_args(model) if model_args is None else model_args
    try:
        return _save(model, folder, args, _settings(input_size, data_config), label_names)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"the model could not be written to {folder}: {reason}; what was there before is "
            "whole. Free some space, or give another folder"
        ) from error


def _save(
    model: nn.Module,
    folder: Path,
    model_args: Mapping[str, Any],
    settings: Mapping[str, Any],
    label_names: Sequence[str] | None,
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary, folder.name)
        _write(model, draft, model_args, settings, label_names)
        apply_umask(draft)
        if not folder.exists():
            draft.rename(folder)
            return folder
        for file in draft.iterdir():
            file.replace(folder / file.name)
    return folder


def _settings(
    input_size: tuple[int, int, int] | None, data_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Keys of the data configuration that are written in place of the model's own."""
    size = {} if input_size is None else {"input_size": tuple(input_size), "crop_pct": 1.0}
    return size | dict(data_config or {})


def updated_data_config(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A timm configuration for other images, without what was recommended for the old ones.

    Args:
        config: The configuration.
        settings: Keys that replace its own.

    Returns:
        A new dict.
    """
    kept = {key: v for key, v in config.items() if not (settings and key.startswith("test_"))}
    return kept | dict(settings)


@contextlib.contextmanager
def _with_config(model: nn.Module, config: dict[str, Any]) -> Iterator[None]:
    """Give the model another timm configuration while it is written."""
    original = model.pretrained_cfg
    try:
        model.pretrained_cfg = config  # type: ignore[assignment]
        yield
    finally:
        model.pretrained_cfg = original


def _recorded_args(model: nn.Module) -> dict[str, Any]:
    args: dict[str, Any] = dict(getattr(model, "kd_model_args", {}))
    if hasattr(model, "_model_args"):
        return {key: value for key, value in args.items() if key not in READ_BY_TIMM}
    return args


def _write(
    model: nn.Module,
    folder: Path,
    model_args: Mapping[str, Any],
    settings: Mapping[str, Any],
    label_names: Sequence[str] | None,
) -> None:
    config = updated_data_config(get_pretrained_cfg(model), settings)
    labels = {} if label_names is None else {"label_names": list(label_names)}
    if labels:
        config = {k: v for k, v in config.items() if k not in ("label_names", "label_descriptions")}
    hook = model.register_state_dict_post_hook(_make_contiguous)  # type: ignore[no-untyped-call]
    try:
        if config.get("architecture"):
            with _with_config(model, config):
                save_for_hf(
                    model, str(folder), model_config=labels, model_args=dict(model_args),
                    safe_serialization=True,
                )  # fmt: skip
            return
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    finally:
        hook.remove()
    found = {
        "architecture": None,
        "class": class_name(model),
        "model_args": {key: repr(value) for key, value in model_args.items()},
        **labels,
        "pretrained_cfg": {key: config[key] for key in DATA_KEYS if config.get(key) is not None},
    }
    (folder / "config.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def _make_contiguous(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Copy each tensor to the CPU: safetensors refuses channels_last and shared tensors."""
    for key, value in state.items():
        state[key] = value.detach().to("cpu", copy=True).contiguous()
