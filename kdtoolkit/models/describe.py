"""What a model says of itself: normalisation, input size, and its lines in a config file."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from kdtoolkit.features.preprocess import config_of, normalisation

__all__ = ["class_name", "config_of", "fixed_input_size", "input_size", "normalisation", "spec_of"]


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) that the model was made for."""
    size = config_of(model).get("input_size")
    if size is None:
        return None
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
    return (getattr(model, "in_chans", size[0]), int(grid[0]), int(grid[1]))


def fixed_input_size(model: nn.Module) -> bool:
    """Whether the model takes `input_size` only, as a ViT without dynamic_img_size."""
    patches = getattr(model, "patch_embed", None)
    if getattr(model, "dynamic_img_size", False):
        return False
    declared = config_of(model).get(
        "fixed_input_size", getattr(patches, "img_size", None) is not None
    )
    return bool(getattr(patches, "strict_img_size", declared))


def spec_of(model: nn.Module, spec: Any = None) -> dict[str, Any]:
    """What a config file says of a model; `spec` is what the user passed."""
    mean, std = normalisation(model) or (None, None)
    return {
        "architecture": config_of(model).get("architecture"),
        "class": class_name(model),
        "model_args": dict(getattr(model, "kd_model_args", {})),
        "num_classes": getattr(model, "num_classes", None),
        "mean": list(mean) if mean else None,
        "std": list(std) if std else None,
        "source": "nn.Module" if spec is None or isinstance(spec, nn.Module) else os.fspath(spec),
    }


def class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
