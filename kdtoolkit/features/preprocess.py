"""What a model does to an image before it looks at it: its own normalisation, and its own size where that is fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from kdtoolkit.features.tracing import trace_model


def config_of(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model as a plain dict; empty for models of other libraries."""
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and not isinstance(cfg, dict):
        cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(vars(cfg))
    return dict(cfg or {})


def normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """mean and std for pixels in [0, 1], one number a channel; None where the model says nothing.

    A model with another number of input channels than its statistics (timm's in_chans=1) gets their average.
    """
    cfg, channels = config_of(model), getattr(model, "in_chans", None)
    if not cfg.get("mean") or not cfg.get("std"):
        return None
    mean, std = (
        values if channels in (None, len(values)) else (sum(values) / len(values),) * channels
        for values in (tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"])))
    )
    return mean, std


class Preprocess:
    """(B, 3, H, W) in [0, 1] -> what the model was trained on: minus mean, over std, resized when `size` is given.

    A small object without parameters: constants are made on the image's device and kept per device.
    """

    def __init__(
        self,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        size: tuple[int, int] | None = None,
    ):
        if (mean is None) != (std is None):
            raise ValueError(
                f"normalisation needs both mean and std, got mean={mean} and std={std}"
            )
        self.mean, self.std, self.size = mean, std, size
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: nn.Module, image: tuple[int, int] | None = None) -> Preprocess:
        """From the model's `pretrained_cfg`; `image` (H, W) is the size of the data, resized only where the model's
        own size is fixed (a ViT's position table) and differs. Where only its table says so (which is that of the
        published weights), a model that runs on images of that size gets them as they are."""
        mean, std = normalisation(model) or (None, None)
        size = fixed_size(model)
        if (
            image is None
            or size in (None, tuple(image))
            or (not _embeds(model) and _runs(model, image))
        ):
            return cls(mean, std)
        return cls(mean, std, size)

    def __call__(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(
                x, size=self.size, mode="bilinear", align_corners=False, antialias=True
            )
        if self.mean is None or self.std is None:
            return x
        key = (x.device, x.dtype)
        if key not in self._constants:
            with torch.inference_mode(
                False
            ):  # an evaluation may come first, a training step uses them after it
                shift, scale = (
                    torch.tensor(v, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
                    for v in (self.mean, self.std)
                )
            self._constants[key] = (shift, scale)
        shift, scale = self._constants[key]
        return (x - shift) / scale

    def __repr__(self) -> str:
        size = f", size={self.size}" if self.size else ""
        return f"Preprocess(mean={self.mean}, std={self.std}{size})"


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The only image size (H, W) that the model takes, or None when it takes any."""
    embeds = _embeds(model)
    first = next((m for m in model.children() if next(m.parameters(), None) is not None), None)
    cfg = config_of(model)
    if not (any(m.strict_img_size for m in embeds) if embeds else cfg.get("fixed_input_size")):
        return None
    embed = (
        first if first in embeds else getattr(model, "patch_embed", None)
    )  # others see less than the image
    size = getattr(embed, "img_size", None) or getattr(model, "kd_model_args", {}).get("img_size")
    size = size or cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _embeds(model: nn.Module) -> list[PatchEmbed]:
    return [m for m in model.children() if isinstance(m, PatchEmbed)]  # patch_embed, a Mixer's stem


def _runs(model: nn.Module, image: tuple[int, int]) -> bool:
    try:
        trace_model(model, (input_shape(model)[0], *image))
    except ValueError:
        return False
    return True


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, H, W) of the images that the model was made for; 3 channels and 224 where it does not say."""
    channels, *size = config_of(model).get("input_size") or (3, 224, 224)
    height, width = fixed_size(model) or size
    return int(getattr(model, "in_chans", channels)), int(height), int(width)
