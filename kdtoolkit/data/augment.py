"""Batched augmentation on the training device: shifted crop and horizontal flip.

What is done to a sample is drawn by an integer hash (`kdtoolkit.data.seeding`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kdtoolkit.data.seeding import RANDOM_BITS, hash_bits
from kdtoolkit.utils.validation import check_choice, check_fraction, check_whole_number


@dataclasses.dataclass(frozen=True)
class BatchAugment:
    """Shifted crop and horizontal flip of a batch of images of equal size.

    What is drawn for a sample depends on the seed, the epoch, its index and the view, not on the
    other samples, the number of workers or ranks, or the device (see `kdtoolkit.data.seeding`).

    Attributes:
        padding: Pixels added on each side before the crop; the offset of the crop is uniform over
            (2 * padding + 1)**2 places. 0: no crop.
        mode: `"zeros"` (black border) or `"reflect"` (mirrored, the edge pixel is not repeated).
        flip: Probability of a horizontal flip, 0 to 1.

    Raises:
        ValueError: If an attribute is outside its range.

    Example:
        >>> augment = BatchAugment(padding=4)
        >>> augment(torch.zeros(8, 3, 32, 32), torch.arange(8), seed=0, epoch=0).shape
        torch.Size([8, 3, 32, 32])
    """

    padding: int = 4
    mode: str = "zeros"
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_choice("mode of BatchAugment", self.mode, ("zeros", "reflect"))
        check_fraction("flip of BatchAugment", self.flip, "probability of a horizontal flip")
        check_whole_number("padding of BatchAugment", self.padding, minimum=0, meaning="pixels")

    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int, view: int = 0) -> Tensor:
        """Augment a batch.

        Args:
            x: Images, (B, C, H, W) of any dtype.
            index: Rows of the samples, (B,) int64.
            seed: Seed of the run.
            epoch: Number of the epoch.
            view: Number of the view; each has draws of its own within an epoch.

        Returns:
            Augmented images, of the shape and dtype of `x`.
        """
        dy, dx, flip = self.draw(index, seed=seed, epoch=epoch, view=view)
        return crop_flip(x, dy, dx, flip, self.padding, self.mode)

    def draw(
        self, index: Tensor, *, seed: int, epoch: int, view: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the crop and the flip of every sample.

        Args:
            index: Rows of the samples, (B,) int64.
            seed: Seed of the run.
            epoch: Number of the epoch.
            view: Number of the view.

        Returns:
            Row offset and column offset, (B,) int64 in 0 .. 2 * padding pixels, and whether to
            flip, (B,) bool.
        """
        bits = hash_bits(seed, epoch, index, [3 * view, 3 * view + 1, 3 * view + 2])
        offsets = (bits[:2] * (2 * self.padding + 1)) >> RANDOM_BITS
        return offsets[0], offsets[1], bits[2] < round(self.flip * 2**RANDOM_BITS)

    def __str__(self) -> str:
        crop = f"crop (padding {self.padding} px, {self.mode})" if self.padding else ""
        flip = f"horizontal flip (p = {self.flip:g})" if self.flip else ""
        return " + ".join(part for part in (crop, flip) if part) or "none"


def crop_flip(
    x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, padding: int, mode: str = "zeros"
) -> Tensor:
    """Crop every padded image at its offset, then flip the chosen ones.

    It is one gather over (B, C, H * W).

    Args:
        x: Images, (B, C, H, W) of any dtype.
        dy: Row offsets, (B,) int64 in 0 .. 2 * padding pixels.
        dx: Column offsets, (B,) int64 in 0 .. 2 * padding pixels.
        flip: Which images to flip horizontally, (B,) bool.
        padding: Pixels added on each side.
        mode: `"zeros"` or `"reflect"`, as in `BatchAugment`.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        ValueError: If the images are too small for a reflected border of `padding` pixels.
    """
    b, c, h, w = x.shape
    rows = dy[:, None] + torch.arange(h, device=x.device)  # (B, H), in the padded image
    cols = dx[:, None] + torch.arange(w, device=x.device)  # (B, W)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    if mode == "reflect":
        if padding >= min(h, w):
            raise ValueError(
                f"reflect padding of {padding} px needs images larger than {h}x{w}: use "
                "mode='zeros'"
            )
        rows, cols, width = _reflect(rows - padding, h), _reflect(cols - padding, w), w
        source = x.contiguous()
    else:
        width = w + 2 * padding
        source = x.new_zeros(b, c, h + 2 * padding, width)
        source[:, :, padding : padding + h, padding : padding + w] = x
    places = rows[:, :, None] * width + cols[:, None, :]  # (B, H, W)
    places = places.view(b, 1, h * w).expand(b, c, h * w)
    return source.view(b, c, -1).gather(2, places).view(b, c, h, w)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions from -(size - 1) to 2 * (size - 1), reflected at both ends into 0 .. size - 1."""
    last = size - 1
    return last - (last - position.abs()).abs()
