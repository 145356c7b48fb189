"""Transforms of one image, for data that is read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from kdtoolkit.data.image_reader import ImageReader
from kdtoolkit.data.images import to_pil

ImageTransform = Callable[[Any], Any]
"""A callable on one image as the data set gives it; makes a (3, H, W) tensor or a PIL image."""

EVAL_CROP = 224 / 256  # share of the resized image that the centre crop keeps
PLAIN_MODES = ("L", "RGB", "RGBA")  # of PIL images that can be resized as they are


@dataclass(frozen=True)
class EvalTransform:
    """What is done to an image for evaluation, in the terms of timm's data configuration.

    Attributes:
        size: (H, W) of the result in pixels.
        crop_pct: Share of the resized image that the centre crop keeps, along a side.
        crop_mode: "center" (the shorter side is resized, the aspect ratio kept) or "squash" (both
            sides are resized).
        interpolation: Of the resize, as timm names it.
        is_exact: Whether timm's transform of these terms gives the same images; False for a
            transform that has no such terms.
    """

    size: tuple[int, int]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    is_exact: bool = True

    def build(self) -> ImageTransform:
        """Make timm's own transform of these terms, without normalisation.

        Returns:
            A transform to (C, H, W) uint8.
        """
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import v2

        transform = create_transform(
            input_size=(3, *self.size), interpolation=self.interpolation, crop_pct=self.crop_pct,
            crop_mode=self.crop_mode, normalize=False,
        )  # fmt: skip
        composed: ImageTransform = v2.Compose([read_image, to_pil, transform])
        return composed

    def __str__(self) -> str:
        height, width = self.size
        if self.crop_mode == "squash" and self.crop_pct == 1:
            return f"Resize to {height}x{width} ({self.interpolation}), aspect ratio not kept"
        resized = [math.floor(side / self.crop_pct) for side in self.size]
        if height == width:
            to = f"Resize of the shorter side to {resized[0]} px"
        else:
            to = f"Resize to cover {resized[0]}x{resized[1]}"
        return f"{to} ({self.interpolation}), CenterCrop to {height}x{width}"


def train_transform(size: tuple[int, int]) -> ImageTransform:
    """Make a random resized crop and horizontal flip.

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        A transform to (C, H, W) uint8.
    """
    from torchvision.transforms import v2

    crop, flip = v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()
    return _compose([read_image, to_pil, crop, flip, v2.PILToTensor()])


def default_eval(size: tuple[int, int]) -> EvalTransform:
    """The evaluation of images of any size: a resize and a centre crop.

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        Of a square: the shorter side becomes 256 / 224 of it, rounded to whole pixels.
    """
    if size[0] != size[1]:
        return EvalTransform(size, EVAL_CROP)
    return EvalTransform(size, crop_share(size[0], round(size[0] / EVAL_CROP)))


def crop_share(side: int, resized: int) -> float:
    """The `crop_pct` with which timm resizes to a number of pixels before the crop.

    Args:
        side: Pixels of the crop.
        resized: Pixels before the crop, at least as many.

    Returns:
        A share that gives these pixels; timm rounds `side / share` down.
    """
    shares = (EVAL_CROP, side / resized, side / (resized + 0.5))
    return next(share for share in shares if math.floor(side / share) == resized)


def resize_transform(size: tuple[int, int]) -> ImageTransform:
    """Make a bilinear resize of the whole image.

    Args:
        size: (H, W) of the output in pixels.

    Returns:
        A transform to (C, H, W): uint8, as PIL resizes; float tensors stay float.
    """
    return _WholeResize(size)


class _WholeResize:
    """Resizes images of 8 bits as PIL and timm do, and float tensors as tensors."""

    def __init__(self, size: tuple[int, int]) -> None:
        from torchvision.transforms import v2

        self.resize_pixels = EvalTransform(size, crop_mode="squash").build()
        self.resize_floats = v2.Resize(size, antialias=True)

    def __call__(self, image: object) -> Any:
        read = read_image(image)
        is_float = isinstance(read, Tensor) and read.is_floating_point()
        return self.resize_floats(read) if is_float else self.resize_pixels(read)


def read_image(image: object) -> Image.Image | Tensor:
    """Read an image that a data set gives, where that has not been done.

    Args:
        image: PIL image, array or tensor.

    Returns:
        A PIL image of 8 bits or a tensor.

    Raises:
        ValueError: If its type, shape or range is not known.
    """
    if isinstance(image, Tensor) or (isinstance(image, Image.Image) and image.mode in PLAIN_MODES):
        return image
    return ImageReader().read(image, "the image")


def _compose(steps: list[ImageTransform]) -> ImageTransform:
    from torchvision.transforms import v2

    composed: ImageTransform = v2.Compose(steps)
    return composed
