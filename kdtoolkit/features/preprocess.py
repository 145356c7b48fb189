"""Input normalisation and resizing: each model gets images as it was trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import (
    fixed_size,
    input_shape,
    normalisation,
    own_channels,
    patch_embeddings,
)
from kdtoolkit.features.tracing import trace_model

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in grey (ITU-R BT.601), as in PIL


class Preprocess:
    """Normalise images and, where needed, resize them, as a model was trained.

    A small object without parameters: constants are made on the image's device and kept per device.
    It takes images (B, C, H, W) in [0, 1]. Colour images become grey for a grey network (the
    weighted mean that PIL takes too), grey ones are repeated for a colour network.

    Args:
        mean: Mean per channel, for pixels in [0, 1]; None for no normalisation.
        std: Standard deviation per channel; None for no normalisation.
        size: (H, W) in pixels to resize to; None for no resizing.
        channels: Channels of the model's images; None takes images as they are.

    Raises:
        ValueError: If only one of mean and std is given.
    """

    def __init__(
        self,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise ValueError(
                f"normalisation needs both mean and std, got mean={mean} and std={std}"
            )
        self.mean, self.std, self.size, self.channels = mean, std, size, channels
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_model(cls, model: nn.Module, image: tuple[int, int] | None = None) -> Preprocess:
        """Read a model's own normalisation, and its size where that is fixed.

        Args:
            model: The model; its `pretrained_cfg` holds mean and std.
            image: Size (H, W) of the data, in pixels. It is resized only where the model's own size
                is fixed (a ViT's position table) and differs. Where only its `pretrained_cfg` says
                so (which is that of the published weights), a model that runs on images of that
                size gets them as they are.
        """
        mean, std = normalisation(model) or (None, None)
        size, channels = fixed_size(model), own_channels(model)
        if image is None or size is None or size == tuple(image):
            return cls(mean, std, channels=channels)
        if not patch_embeddings(model) and _can_run(model, image):
            return cls(mean, std, channels=channels)
        return cls(mean, std, size, channels)

    def __call__(self, x: Tensor) -> Tensor:
        """Prepare images (B, C, H, W) in [0, 1]."""
        if self.channels not in (None, x.shape[1]):
            x = _match_channels(x, self.channels)
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(
                x, size=self.size, mode="bilinear", align_corners=False, antialias=True
            )
        if self.mean is None or self.std is None:
            return x
        key = (x.device, x.dtype)
        if key not in self._constants:
            self._constants[key] = _per_channel(self.mean, x), _per_channel(self.std, x)
        shift, scale = self._constants[key]
        return (x - shift) / scale

    def __repr__(self) -> str:
        size = f", size={self.size}" if self.size else ""
        return f"Preprocess(mean={self.mean}, std={self.std}{size})"


def _match_channels(x: Tensor, channels: int | None) -> Tensor:
    """(B, 1, H, W) or (B, 3, H, W) of the other; anything else is left to the model to refuse."""
    if channels == 3 and x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    if channels == 1 and x.shape[1] == 3:
        weights = torch.tensor(LUMA, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
        return (x * weights).sum(1, keepdim=True)
    return x


def _per_channel(numbers: tuple[float, ...], x: Tensor) -> Tensor:
    """(1, C, 1, 1) on the image's device, usable in training after an evaluation too."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)


def _can_run(model: nn.Module, image: tuple[int, int]) -> bool:
    try:
        trace_model(model, (input_shape(model)[0], *image))
    except ValueError:
        return False
    return True
