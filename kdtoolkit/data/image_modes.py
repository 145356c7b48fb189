"""PIL images of any mode: upright, laid on a background where they are transparent, in RGB."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits a channel
OUTPUT_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> mode
EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; the result has none.

    Args:
        image: The image.

    Returns:
        A turned copy, or the image itself where it is upright.
    """
    if not any(key in image.info for key in EXIF_KEYS):
        return image
    return ImageOps.exif_transpose(image)


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, or a colour that is transparent.

    Args:
        image: The image, of any mode.

    Returns:
        Whether its mode or its header says so.
    """
    return image.mode in ALPHA_MODES or "transparency" in image.info


def convert(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """Convert an image of 8 bits a channel.

    Args:
        image: The image, of any mode that is not in `WIDE_MODES`.
        mode: `"L"`, `"RGB"` or `"RGBA"`; the last keeps transparency.
        background: Colour (R, G, B) that a transparent image is laid on.

    Returns:
        The image in that mode.
    """
    if image.mode == mode and "transparency" not in image.info:
        return image
    if is_transparent(image):
        rgba = _to_rgba(image)
        if mode == "RGBA":
            return rgba
        image = lay_on(rgba, background)
    if image.mode == "LAB":
        image = _from_lab(image)
    return image if image.mode == mode else image.convert(mode)


def lay_on(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Lay an RGBA image on a background.

    Args:
        image: The image.
        background: Colour (R, G, B), 0 to 255 each.

    Returns:
        The RGB image.
    """
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of a PNG with 16 bits, which PIL reads as 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and key > 255 and image.mode == "L":
        image.info["transparency"] = key >> 8
    return image if image.mode == "RGBA" else image.convert("RGBA")


def wide_values(image: Image.Image) -> np.ndarray:
    """Values of an image of more than 8 bits.

    Args:
        image: An image of a mode in `WIDE_MODES`.

    Returns:
        (H, W), uint16, int32 or float32.
    """
    values = np.asarray(image)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def wide_as_8_bits(
    image: Image.Image, values: np.ndarray, background: tuple[int, int, int]
) -> Image.Image:
    """The 8-bit image of one of more bits.

    Args:
        image: The image of a mode in `WIDE_MODES`.
        values: Its values in 8 bits, (H, W) uint8.
        background: Colour (R, G, B) of pixels of the value that the file calls transparent.

    Returns:
        An image of mode L, or RGB where some value is transparent.
    """
    grey = Image.fromarray(values)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    opaque = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    canvas = Image.new("RGB", grey.size, background)
    canvas.paste(grey.convert("RGB"), mask=opaque)
    return canvas


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    found: Any = ImageCms.applyTransform(image, _lab_transform())
    return found  # type: ignore[no-any-return]


@functools.cache
def _lab_transform() -> Any:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")  # type: ignore[arg-type]
