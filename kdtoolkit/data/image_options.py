"""Checks of the options that say how images are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

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
    if type(channels) is not int or channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}; allowed: 3, 1 (grey images) or 4")
    return ImageOptions(_check_background(background), channels, _check_range(pixel_range))


def _check_background(background: Background) -> tuple[int, int, int] | None:
    if background is None:
        return None
    try:
        if isinstance(background, str):
            red, green, blue = ImageColor.getrgb(background)[:3]
            return red, green, blue
        values: list[Any] = list(background) if isinstance(background, Sequence) else []
        if len(values) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in values):
            raise ValueError("not three whole numbers from 0 to 255")
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"background={background!r}: a colour such as 'white', 'black' or '#ff8800', or "
            "(red, green, blue), whole numbers from 0 to 255"
        ) from e
    return values[0], values[1], values[2]


def _check_range(pixel_range: Sequence[float] | None) -> tuple[float, float] | None:
    if pixel_range is None:
        return None
    try:
        low, high = (float(value) for value in pixel_range)
        is_list = isinstance(pixel_range, Sequence) and not isinstance(pixel_range, str)
        is_range = is_list and low < high and math.isfinite(high - low)
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ValueError(
            f"pixel_range={pixel_range!r}: (value of black, value of white), two numbers in rising "
            "order, such as (0, 4095)"
        )
    return low, high
