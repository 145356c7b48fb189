"""Checks of the options that say how images are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from PIL import ImageColor

from kdtoolkit.data.image_reader import CHANNELS, ImageOptions

Background: TypeAlias = str | Sequence[int] | None
"""A colour, as PIL names it ("white", "#ff8800") or as (R, G, B); None: white."""


def check_image_options(
    background: Background, channels: int, pixel_range: Sequence[float] | None
) -> ImageOptions:
    """Check how images are to be read.

    Args:
        background: Colour that transparent images are laid on.
        channels: Number of channels of the images that networks get.
        pixel_range: Values of black and white of images that are not of 8 bits, or None.

    Returns:
        The options.

    Raises:
        ValueError: If a value is none of the allowed ones.
    """
    if isinstance(channels, bool) or channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}; allowed: 3, 1 (grey images) or 4")
    return ImageOptions(_check_background(background), channels, _check_range(pixel_range))


def _check_background(background: Background) -> tuple[int, int, int] | None:
    if background is None:
        return None
    try:
        if isinstance(background, str):
            red, green, blue = ImageColor.getrgb(background)[:3]
        else:
            red, green, blue = background
            is_byte = [type(value) is int and 0 <= value <= 255 for value in background]
            if not all(is_byte):
                raise ValueError("not whole numbers from 0 to 255")
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"background={background!r}: a colour such as 'white', 'black' or '#ff8800', or "
            "(red, green, blue), whole numbers from 0 to 255"
        ) from e
    return red, green, blue


def _check_range(pixel_range: Sequence[float] | None) -> tuple[float, float] | None:
    if pixel_range is None:
        return None
    try:
        low, high = (float(value) for value in pixel_range)
        is_range = not isinstance(pixel_range, str) and low < high and math.isfinite(high - low)
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ValueError(
            f"pixel_range={pixel_range!r}: (value of black, value of white), two numbers in rising "
            "order, such as (0, 4095)"
        )
    return low, high
