"""Transforms of one image, for data that is read row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kdtoolkit.data.images import to_pil, to_tensor

ImageTransform = Callable[[Any], Any]
"""A callable on one image as the data set gives it; makes a (3, H, W) tensor or a PIL image."""


def train_transform(size: tuple[int, int]) -> ImageTransform:
    """Make a random resized crop and horizontal flip.

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        A transform to (3, H, W) uint8.
    """
    from torchvision.transforms import v2

    steps = [to_pil, v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    return _compose(steps)


def eval_transform(size: tuple[int, int]) -> ImageTransform:
    """Make a resize and centre crop: the shorter side becomes 256 / 224 of the longer of (H, W).

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        A transform to (3, H, W) uint8.
    """
    from torchvision.transforms import v2

    shorter_side = round(max(size) * 256 / 224)
    return _compose([to_pil, v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


def resize_transform(size: tuple[int, int]) -> ImageTransform:
    """Make a resize of the whole image.

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        A transform to (3, H, W), uint8 or float as the image was.
    """
    from torchvision.transforms import v2

    return _compose([_image_to_tensor, v2.Resize(size, antialias=True)])


def _compose(steps: list[ImageTransform]) -> ImageTransform:
    from torchvision.transforms import v2

    composed: ImageTransform = v2.Compose(steps)
    return composed


def _image_to_tensor(image: object) -> Tensor:
    return to_tensor(image, "image")
