"""What images a model expects: channels, size, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers.patch_embed import PatchEmbed
from torch import nn

ImageSize = (
    int | Sequence[int] | None
)  # H, (H, W) or (channels, H, W), in pixels; None: the model's own
DEFAULT_INPUT = (3, 224, 224)


def get_pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Read timm's `pretrained_cfg` of a model as a plain dict; empty for other libraries.

    Args:
        model: Any model.

    Returns:
        A new dict.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is None:
        return {}
    if isinstance(cfg, dict):
        return dict(cfg)
    return dict(cfg.to_dict() if hasattr(cfg, "to_dict") else vars(cfg))


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The statistics that a model's images are normalised with.

    Args:
        model: Any model. One with another number of input channels than its statistics (timm's
            `in_chans=1`) gets their average.

    Returns:
        Mean and standard deviation for pixels in [0, 1], one number a channel; None where the model
        does not say.
    """
    cfg = get_pretrained_cfg(model)
    if not cfg.get("mean") or not cfg.get("std"):
        return None
    channels = own_channels(model)
    return _per_channel(cfg["mean"], channels), _per_channel(cfg["std"], channels)


def _per_channel(numbers: Sequence[float], channels: int | None) -> tuple[float, ...]:
    values = tuple(float(number) for number in numbers)
    if channels is None or channels == len(values):
        return values
    return (sum(values) / len(values),) * channels


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The only image size (H, W) that a model takes, or None when it takes any.

    Args:
        model: Any model.

    Returns:
        Height and width in pixels, or None.
    """
    embeds = patch_embeddings(model)
    cfg = get_pretrained_cfg(model)
    if embeds:
        is_fixed = any(embed.strict_img_size for embed in embeds)
    else:
        is_fixed = bool(cfg.get("fixed_input_size"))
    if not is_fixed:
        return None
    # the embedding that sees the image; others see less than it
    first = next((m for m in model.children() if next(m.parameters(), None) is not None), None)
    embed = first if first in embeds else getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or getattr(model, "kd_model_args", {}).get("img_size")
    size = size or cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def patch_embeddings(model: nn.Module) -> list[PatchEmbed]:
    """The patch embeddings among a model's children: a ViT's patch_embed, a Mixer's stem.

    Args:
        model: Any model; modules deeper than its children are not looked at.

    Returns:
        timm's `PatchEmbed` modules, in the order of the children; empty for other models.
    """
    return [module for module in model.children() if isinstance(module, PatchEmbed)]


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """The images (channels, H, W) that a model was made for; by default (3, 224, 224).

    Args:
        model: Any model.

    Returns:
        Number of channels, and height and width in pixels.
    """
    channels, *size = get_pretrained_cfg(model).get("input_size") or DEFAULT_INPUT
    height, width = fixed_size(model) or size
    return own_channels(model) or int(channels), int(height), int(width)


def own_channels(model: nn.Module) -> int | None:
    """The number of channels of a model's images, as far as the model says it.

    Args:
        model: Any model.

    Returns:
        Its `in_chans`, else that of its `pretrained_cfg`; of a model without either, 1 or 4 where
        its first convolution takes so many; else None.
    """
    found = (
        getattr(model, "in_chans", None) or get_pretrained_cfg(model).get("input_size", [None])[0]
    )
    if found is not None:
        return int(found)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 4) else None


def image_size(model: nn.Module, size: ImageSize = None) -> tuple[int, int, int]:
    """Complete an image size.

    Args:
        model: The model that the images are for.
        size: H, (H, W) or (channels, H, W) in pixels; what is left out is the model's own.

    Returns:
        (channels, H, W).

    Raises:
        ValueError: If `size` is none of these.
    """
    own = input_shape(model)
    if size is None:
        return own
    if isinstance(size, str):
        raise ValueError(f"image size {size!r} is not H, (H, W) or (3, H, W)")
    given = (size, size) if isinstance(size, int) else tuple(int(pixels) for pixels in size)
    if len(given) not in (2, 3) or min(given) < 1:
        raise ValueError(f"image size {size} is not H, (H, W) or (3, H, W)")
    channels = given[0] if len(given) == 3 else own[0]
    return channels, given[-2], given[-1]
