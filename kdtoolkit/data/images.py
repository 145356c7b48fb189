"""Images in any form: decoded, turned into RGB, arrays or tensors, and checked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    import datasets

RANGE_TOLERANCE = 0.01  # how far resampled floats may lie outside [0, 1]


def decode_image(value: object, split: str, row: int) -> Image.Image:
    """Decode an image in the stored form of an HF data set, and turn it upright where EXIF says so.

    Args:
        value: `{"bytes": ..., "path": ...}`.
        split: Name of the split, for the message.
        row: Number of the row, for the message.

    Returns:
        An RGB image.

    Raises:
        ValueError: If the image is missing or cannot be decoded; names the split and the row.
    """
    try:
        if value is None:
            raise ValueError("empty")
        return to_rgb(_image_feature().decode_example(value))
    except Exception as e:  # a decoder may raise anything
        path = f" ({value['path']})" if isinstance(value, Mapping) and value.get("path") else ""
        raise ValueError(
            f"split {split!r}, row {row}{path}: the image cannot be decoded: {e}. Replace or "
            "remove that row."
        ) from e


@functools.cache
def _image_feature() -> datasets.Image:
    import datasets

    return datasets.Image()


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any PIL mode into RGB.

    Args:
        image: The image; 16-bit grey is scaled to 8 bits.

    Returns:
        The RGB image, 8 bits a channel.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pil(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """Turn an image into an RGB PIL image.

    Args:
        image: PIL image, (H, W) or (H, W, C) uint8 array, or (C, H, W) tensor.

    Returns:
        The RGB image.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    return to_rgb(image if isinstance(image, Image.Image) else to_pil_image(image))


def to_uint8(
    image: Image.Image | np.ndarray | Tensor, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Turn an image into an array.

    Args:
        image: PIL image, array or uint8 tensor, as in `to_pil`.
        size: (H, W) in pixels to resize to (bilinear, antialiased); None keeps the size.

    Returns:
        (3, H, W) uint8.
    """
    image = to_pil(image)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def to_tensor(image: object, where: str) -> Tensor:
    """Turn what a data set or a transform returned into a tensor, and check it.

    Args:
        image: PIL image, array, or tensor (1 or 3, H, W).
        where: Start of the message of an error.

    Returns:
        (3, H, W) uint8, or float in [0, 1].

    Raises:
        ValueError: If the kind, the shape or the range of values is another.
    """
    if isinstance(image, (Image.Image, np.ndarray)):
        return torch.from_numpy(np.ascontiguousarray(to_uint8(image)))
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{where}: the image is {type(image).__name__}, expected a (3, H, W) tensor or a PIL "
            "image"
        )
    plain: Tensor = image.as_subclass(Tensor)  # type: ignore[arg-type]
    if plain.ndim != 3 or plain.shape[0] not in (1, 3):
        raise ValueError(f"{where}: the image has shape {tuple(plain.shape)}, expected (3, H, W)")
    check_pixel_range(plain, where)
    return plain.expand(3, -1, -1)


def check_pixel_range(x: Tensor, where: str) -> None:
    """Check that images are uint8, or floats in [0, 1] (0.01 of tolerance for resampling).

    Args:
        x: Images of any shape.
        where: Start of the message of an error.

    Raises:
        ValueError: If they are anything else, such as normalised images.
    """
    if x.dtype == torch.uint8:
        return
    if not x.is_floating_point():
        raise ValueError(f"{where}: images of type {x.dtype}, expected uint8 or float in [0, 1]")
    low, high = (float(v) for v in x.aminmax())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"{where}: image values from {low:.3g} to {high:.3g}, expected [0, 1]. "
            "Each model normalises its own input: remove Normalize from the transforms."
        )


def image_size(image: Image.Image | np.ndarray | Tensor) -> tuple[int, int]:
    """Return the size of an image.

    Args:
        image: PIL image, (H, W) or (H, W, C) array, or (C, H, W) tensor.

    Returns:
        (H, W) in pixels.
    """
    if isinstance(image, Tensor):
        return int(image.shape[-2]), int(image.shape[-1])
    width, height = to_pil(image).size
    return height, width
