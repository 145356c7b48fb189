"""Images: decoded, read, as arrays or tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtoolkit.data.image_reader import ImageOptions, ImageReader
from kdtoolkit.data.row_error import RowError

if TYPE_CHECKING:
    import datasets


def decode_image(value: object, split: str, row: int) -> Image.Image:
    """Decode an image in the stored form of an HF data set, and turn it upright where EXIF says so.

    Args:
        value: `{"bytes": ..., "path": ...}`.
        split: Name of the split, for the message.
        row: Number of the row, for the message.

    Returns:
        The image, in the mode of the file.

    Raises:
        RowError: If the image is missing or cannot be decoded; names the split and the row.
    """
    try:
        if value is None:
            raise ValueError("empty")
        image: Image.Image = _image_feature().decode_example(value)
        return image
    except Exception as e:  # a decoder may raise anything
        path = f" ({value['path']})" if isinstance(value, Mapping) and value.get("path") else ""
        raise RowError(
            f"split {split!r}, row {row}{path}: the image cannot be decoded: {e}. Replace or "
            "remove that row."
        ) from e


@functools.cache
def _image_feature() -> datasets.Image:
    import datasets

    return datasets.Image()


def to_pil(image: Image.Image | Tensor) -> Image.Image:
    """Turn an image that an `ImageReader` has read into a PIL image.

    Args:
        image: PIL image, or (C, H, W) tensor, uint8 or float in [0, 1].

    Returns:
        The image; floats are rounded to 8 bits.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    if isinstance(image, Image.Image):
        return image
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    found: Image.Image = to_pil_image(image)
    return found


def to_uint8(image: Image.Image | Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """Turn an image that an `ImageReader` has read into an array.

    Args:
        image: PIL image or uint8 tensor, as in `to_pil`.
        size: (H, W) in pixels to resize to (bilinear, antialiased); None keeps the size.

    Returns:
        (C, H, W) uint8.
    """
    image = to_pil(image)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def as_tensor(image: Image.Image | Tensor) -> Tensor:
    """Turn an image that an `ImageReader` has read into a tensor.

    Args:
        image: PIL image or tensor.

    Returns:
        (C, H, W), uint8 of a PIL image; a tensor as it is.
    """
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(to_uint8(image), order="C"))


def to_tensor(image: object, where: str, options: ImageOptions | None = None) -> Tensor:
    """Turn what a transform or an `ImageReader` returned into a tensor, and check it.

    Args:
        image: PIL image, array or tensor: uint8, or float in [0, 1].
        where: Start of the message of an error.
        options: What the user says of the images.

    Returns:
        (3, H, W) uint8, or float in [0, 1]; other numbers of channels as the options say.

    Raises:
        ValueError: If the kind, the shape or the range of values is another.
    """
    return as_tensor(_output_reader(options or ImageOptions()).read(image, where))


@functools.cache
def _output_reader(options: ImageOptions) -> ImageReader:
    """Reads uint8 and floats in [0, 1]."""
    return ImageReader(options)


def image_size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Return the size of an image.

    Args:
        image: PIL image, or (C, H, W) tensor.

    Returns:
        (H, W) in pixels.
    """
    if isinstance(image, Tensor):
        return int(image.shape[-2]), int(image.shape[-1])
    width, height = image.size
    return height, width
