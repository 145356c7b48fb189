"""The values that mean black and white in images that are not of 8 bits.

They are decided once for a data set, from the type of the images and from those that are looked at
first. A later image outside of them is an error, so that no two images are scaled differently.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

RANGE_TOLERANCE = 0.01  # how far resampled floats may lie outside, as a share of the range
INTEGER_BITS = (8, 10, 12, 14, 16)  # the fewest of these that hold the integers are their range
DARKEST_WHITE = 128  # the largest value that 8-bit images may have at least, in wider types
DECIDED = "decided from the first images"
NORMALISED = "Each model normalises its own input: remove Normalize from the transforms."


@dataclasses.dataclass(frozen=True)
class PixelRange:
    """The values of black and white.

    Attributes:
        low: Value of black.
        high: Value of white.
        kind: `"integer"` or `"float"`.
        reason: Where the range comes from, in words.
    """

    low: float
    high: float
    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.low:g} .. {self.high:g}"

    def check(self, low: float, high: float, where: str) -> None:
        """Check the smallest and the largest value of an image.

        Args:
            low: Smallest value.
            high: Largest value.
            where: Start of the message of an error.

        Raises:
            ValueError: If one is outside of the range, or is not finite.
        """
        slack = RANGE_TOLERANCE * (self.high - self.low) if self.kind == "float" else 0
        if self.low - slack <= low and high <= self.high + slack:  # false for NaN
            return
        advice = NORMALISED if low < 0 <= self.low else "Correct that image"
        if not self.reason:  # the output of transforms
            more = "" if low < 0 else " Scale the images."
            raise ValueError(f"{where}: {_values(low, high)}, expected [0, 1].{more} {NORMALISED}")
        raise ValueError(
            f"{where}: {_values(low, high)}, expected {self} ({self.reason}). {advice}, or pass "
            "pixel_range=(value of black, value of white) of the whole data set."
        )

    def check_values(self, values: np.ndarray, where: str) -> None:
        """Check an image.

        Args:
            values: Its values, of any shape.
            where: Start of the message of an error.

        Raises:
            ValueError: As `check`, and if it is one in [0, 1] of a data set whose range was decided
                to be 0 .. 255.
        """
        self.check(float(values.min()), float(values.max()), where)
        if self.reason == DECIDED and self.high == 255 and is_unit(values):
            raise ValueError(mixed_ranges(where, "other images are in 0 .. 255"))

    def to_uint8(self, values: np.ndarray) -> np.ndarray:
        """Scale values to 0 .. 255.

        Args:
            values: Array of any shape, inside of the range.

        Returns:
            uint8 of the same shape: the upper 8 bits of integers of a whole number of bits, else
            rounded.
        """
        bits = int(self.high).bit_length()
        if self.kind == "integer" and self.low == 0 and self.high == 2**bits - 1 and bits >= 8:
            return (values >> (bits - 8)).astype(np.uint8)
        scaled = (values.astype(np.float64) - self.low) * (255 / (self.high - self.low))
        return scaled.round().clip(0, 255).astype(np.uint8)

    def to_unit(self, x: Tensor) -> Tensor:
        """Scale values to 0 .. 1.

        Args:
            x: Float tensor of any shape.

        Returns:
            float32 of the same shape; values that are in [0, 1] already are not changed.
        """
        x = x.to(torch.float32)
        return x if (self.low, self.high) == (0, 1) else (x - self.low) / (self.high - self.low)


UNIT = PixelRange(0, 1, "float")


def is_unit(values: np.ndarray) -> bool:
    """Whether an image can only be one in [0, 1].

    Args:
        values: Its values, of any shape.

    Returns:
        True for floats up to 1 that are not all whole.
    """
    if not np.issubdtype(values.dtype, np.floating) or not 0 < values.max() <= 1 + RANGE_TOLERANCE:
        return False
    return bool((values % 1).any())


def mixed_ranges(where: str, others: str) -> str:
    """The message for floats in [0, 1] beside others.

    Args:
        where: Start of the message.
        others: What the others are, in words.

    Returns:
        The message.
    """
    return (
        f"{where}: the image is in [0, 1], {others}: scale all images of the data set alike, or "
        "pass pixel_range=(value of black, value of white)."
    )


def decide_range(
    kind: str, low: float, high: float, given: tuple[float, float] | None, where: str
) -> PixelRange:
    """Decide the range of a data set.

    Args:
        kind: `"integer"` for integers other than uint8, or `"float"`.
        low: Smallest value of the images that were looked at.
        high: Largest value of these.
        given: The option `pixel_range`, or None.
        where: Start of the message of an error.

    Returns:
        The range.

    Raises:
        ValueError: If the values fit none of the known ranges.
    """
    if given is not None:
        return PixelRange(*given, kind, "pixel_range")
    known = _known_range(kind, low, high)
    if known is not None:
        return PixelRange(0, known, kind, DECIDED)
    if kind == "float":
        allowed = "floats in [0, 1] or in 0 .. 255"
    else:
        allowed = "integers of 1, 8, 10, 12, 14 or 16 bits"
    normalised = f" {NORMALISED}" if low < 0 else ""
    raise ValueError(
        f"{where}: {_values(low, high)}, expected {allowed}.{normalised} Or pass "
        "pixel_range=(value of black, value of white)."
    )


def _known_range(kind: str, low: float, high: float) -> float | None:
    """The value of white, or None."""
    if kind == "float":
        if low < -RANGE_TOLERANCE * (255 if high > 2 else 1):
            return None
        if high <= 1 + RANGE_TOLERANCE:
            return 1
        return 255 if DARKEST_WHITE <= high <= 255 * (1 + RANGE_TOLERANCE) else None
    if low < 0:
        return None
    if high <= 1:
        return 1
    if high < DARKEST_WHITE:
        return None
    return next((2**bits - 1 for bits in INTEGER_BITS if high < 2**bits), None)


def _values(low: float, high: float) -> str:
    return f"image values from {low:.6g} to {high:.6g}"
