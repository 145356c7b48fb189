"""Which layers of a network give feature maps, and how their outputs are laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.types import Shape

MAX_PREFIX_TOKENS = 10


def stage_channels(model: nn.Module) -> dict[str, int | None]:
    """Stages that timm's `feature_info` names, in order, with their channels where it says them.

    Args:
        model: The model, of timm or not.

    Returns:
        Name of a module of the model -> channels, or None where they are not said; empty without
        `feature_info`.
    """
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    if not isinstance(rows, (list, tuple)):
        return {}
    modules = dict(model.named_modules())
    names = {
        row["module"]: row.get("num_chs")
        for row in rows
        if isinstance(row, dict) and row.get("module")
    }
    return {name: channels for name, channels in names.items() if name in modules}


def find_last_map(model: nn.Module, image: Tensor) -> list[str]:
    """Find the module that returns last of those with a 4-D output of more than one position.

    Args:
        model: The network.
        image: Images (B, C, H, W), of which the first is used.

    Returns:
        Its name in a list, which is empty where there is none.
    """
    seen: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            is_map = isinstance(output, Tensor) and output.ndim == 4
            if is_map and output.shape[2] * output.shape[3] > 1:
                seen.append(name)

        return hook

    handles = [m.register_forward_hook(hook_of(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(image[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1:]


def to_feature_map(
    feature: Tensor, model: nn.Module, channels: int | None, aspect: float
) -> Tensor:
    """Lay out a feature as a map.

    Args:
        feature: (B, C, h, w), (B, h, w, C) or tokens (B, L, C).
        model: The network; its `num_prefix_tokens` are left out first where they fit.
        channels: Channels of the layer, where they are known.
        aspect: Height over width of the image.

    Returns:
        The feature as (B, C, h, w).
    """
    if feature.ndim == 4:
        return feature.permute(0, 3, 1, 2) if _is_nhwc(feature, channels, aspect) else feature
    prefix, (rows, columns) = _token_grid(feature.shape[1], model, aspect)
    tokens = feature[:, prefix:].transpose(1, 2)  # (B, C, L - prefix)
    return tokens.reshape(*tokens.shape[:2], rows, columns)


def _is_nhwc(feature: Tensor, channels: int | None, aspect: float) -> bool:
    """Whether the last dimension holds the channels: by their number, else by the shape."""
    _, first, second, last = feature.shape
    if channels in (first, last):
        return last == channels != first
    return last > first and first / second == aspect


def _token_grid(tokens: int, model: nn.Module, aspect: float) -> tuple[int, tuple[int, int]]:
    """Prefix tokens (class, register, distillation), and rows and columns of the others.

    The grid has the sides of the image where that is possible.
    """
    hint = int(getattr(model, "num_prefix_tokens", 0))
    possible = [hint, *range(min(tokens, MAX_PREFIX_TOKENS + 1))]
    for prefix in dict.fromkeys(possible):
        positions = tokens - prefix
        rows = round((positions * aspect) ** 0.5)
        columns = round(rows / aspect)
        if rows and rows * columns == positions:
            return prefix, (rows, columns)
    return hint, Shape((tokens, 1), prefix=hint).grid
