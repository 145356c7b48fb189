"""What a model says about itself: input size, class, and its lines in a config file."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg, normalisation


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the image size (channels, height, width) that a model was made for.

    Args:
        model: Any model.

    Returns:
        The size in pixels; None where the model has no timm configuration that says it.
    """
    size = get_pretrained_cfg(model).get("input_size")
    if size is None:
        return None
    patch_embed = getattr(model, "patch_embed", None)
    height, width = getattr(patch_embed, "img_size", None) or size[1:]
    return (getattr(model, "in_chans", size[0]), int(height), int(width))


def fixed_input_size(model: nn.Module) -> bool:
    """Tell whether a model takes images of its `input_size` only, as a ViT does by default.

    Args:
        model: Any model.

    Returns:
        False for a model that takes any size, as a ViT with `dynamic_img_size=True`.
    """
    if getattr(model, "dynamic_img_size", False):
        return False
    patch_embed = getattr(model, "patch_embed", None)
    has_size = getattr(patch_embed, "img_size", None) is not None
    declared = get_pretrained_cfg(model).get("fixed_input_size", has_size)
    return bool(getattr(patch_embed, "strict_img_size", declared))


def describe_model(
    model: nn.Module, spec: nn.Module | str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Describe a model as a config file does.

    Args:
        model: Any model.
        spec: What the user gave for it: a name, a path, or the module itself.

    Returns:
        Plain values: `architecture` (timm's name or None), `class`, `model_args` (arguments of the
        constructor), `num_classes`, `mean` and `std` (of the input normalisation, or None),
        `source`.
    """
    mean, std = normalisation(model) or (None, None)
    source = "nn.Module" if spec is None or isinstance(spec, nn.Module) else os.fspath(spec)
    return {
        "architecture": get_pretrained_cfg(model).get("architecture"),
        "class": class_name(model),
        "model_args": dict(getattr(model, "kd_model_args", {})),
        "num_classes": getattr(model, "num_classes", None),
        "mean": list(mean) if mean else None,
        "std": list(std) if std else None,
        "source": source,
    }


def class_name(model: nn.Module) -> str:
    """Return the full name of a model's class, "package.module.Class".

    Args:
        model: Any module.

    Returns:
        The name.
    """
    return f"{type(model).__module__}.{type(model).__qualname__}"


def set_config(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a model a timm configuration, `pretrained_cfg`.

    Args:
        model: Any model.
        config: The configuration; it replaces the old one.
    """
    model.pretrained_cfg = config  # type: ignore[assignment]
    model.default_cfg = config  # type: ignore[assignment]
