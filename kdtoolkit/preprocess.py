"""What a model does to an image before it looks at it: its own normalisation, and its own size where that is fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def config_of(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model as a plain dict; empty for models of other libraries."""
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg is not None and not isinstance(cfg, dict):
        cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(vars(cfg))
    return dict(cfg or {})


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
            raise ValueError(f"normalisation needs both mean and std, got mean={mean} and std={std}")
        self.mean, self.std, self.size = mean, std, size
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, model: nn.Module, image: tuple[int, int] | None = None) -> Preprocess:
        """From the model's `pretrained_cfg`; `image` (H, W) is the size of the data, resized only where the model's
        own size is fixed (a ViT's position table) and differs."""
        cfg = config_of(model)
        size = fixed_size(model)
        if image is None or size == tuple(image):
            size = None
        return cls(cfg.get("mean"), cfg.get("std"), size)

    def __call__(self, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        if self.mean is None or self.std is None:
            return x
        key = (x.device, x.dtype)
        if key not in self._constants:
            shift, scale = (
                torch.tensor(v, device=x.device, dtype=x.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std)
            )
            self._constants[key] = (shift, scale)
        shift, scale = self._constants[key]
        return (x - shift) / scale

    def __repr__(self) -> str:
        size = f", size={self.size}" if self.size else ""
        return f"Preprocess(mean={self.mean}, std={self.std}{size})"


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """The only image size (H, W) that the model takes, or None when it takes any."""
    embed = getattr(model, "patch_embed", None)
    strict = getattr(embed, "strict_img_size", False) and getattr(embed, "img_size", None) is not None
    if strict:
        assert embed is not None
        height, width = embed.img_size
        return int(height), int(width)
    cfg = config_of(model)
    if cfg.get("fixed_input_size") and cfg.get("input_size"):
        return int(cfg["input_size"][1]), int(cfg["input_size"][2])
    return None
