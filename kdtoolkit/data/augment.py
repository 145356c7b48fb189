"""Batched augmentation on the training device: shifted crop and horizontal flip, drawn per sample by an integer hash.

A sample's random numbers depend on (seed, epoch, index, stream) and on nothing else: not on the order or composition of
the batch, not on workers, ranks or the device. All arithmetic is on integers, so CPU and CUDA give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
BITS = 24  # random bits per draw: what a float32 in [0, 1) holds exactly
MUL_A, MUL_B = (
    0x7FEB352D,
    0x846CA68B - (1 << 32),
)  # lowbias32 (Wellons 2018); B less 2**32: int64 cannot overflow


def mix(x):
    """Finaliser of a 32-bit hash, for a Python int or an int64 tensor holding 0 .. 2**32 - 1: the same bijection."""
    x = ((x ^ (x >> 16)) * MUL_A) & MASK
    x = ((x ^ (x >> 15)) * MUL_B) & MASK
    return x ^ (x >> 16)


def key(*parts: int) -> int:
    """Fold any number of Python integers (of any size or sign) into 32 bits."""
    state = 0x9E3779B9
    for part in parts:
        part = int(part) & ((1 << 64) - 1)
        state = mix((state + (part & MASK)) & MASK)
        state = mix((state + (part >> 32) + 0x632BE5AB) & MASK)
    return state


def hash_bits(seed: int, epoch: int, index: Tensor, streams: Sequence[int]) -> Tensor:
    """(B,) int64 index -> (len(streams), B) int64, uniform over 0 .. 2**24 - 1, on the device of `index`."""
    first = torch.tensor([key(seed, epoch, s, 1) for s in streams], device=index.device)[:, None]
    second = torch.tensor([key(seed, epoch, s, 2) for s in streams], device=index.device)[:, None]
    x = mix((index & MASK) ^ first)
    x = mix((x + ((index >> 32) & MASK) + second) & MASK)
    return x >> (32 - BITS)


def hash_uniform(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """(B,) int64 index -> (B,) float32 in [0, 1): one number per sample; `stream` tells independent draws apart."""
    return hash_bits(seed, epoch, index, [stream])[0].to(torch.float32) * 2.0**-BITS


@dataclasses.dataclass(frozen=True)
class BatchAugment:
    """Shifted crop and horizontal flip of a batch of images of equal size.

    padding  pixels on each side; the crop's offset is uniform over (2 * padding + 1)**2 places; 0: no crop
    mode     "zeros" (black border) or "reflect" (mirrored, the edge pixel not repeated)
    flip     probability of a horizontal flip, 0 to 1
    """

    padding: int = 4
    mode: str = "zeros"
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in ("zeros", "reflect"):
            raise ValueError(f"BatchAugment(mode={self.mode!r}): allowed are 'zeros' and 'reflect'")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"BatchAugment(flip={self.flip}): a probability from 0 to 1")
        if isinstance(self.padding, bool) or not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(
                f"BatchAugment(padding={self.padding!r}): pixels, an integer of 0 or more"
            )

    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int, view: int = 0) -> Tensor:
        """(B, C, H, W) of any dtype, (B,) int64 -> the same shape and dtype. `view` draws anew for the same epoch."""
        dy, dx, flip = self.draw(index, seed=seed, epoch=epoch, view=view)
        return crop_flip(x, dy, dx, flip, self.padding, self.mode)

    def draw(
        self, index: Tensor, *, seed: int, epoch: int, view: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) int64 -> row offset, column offset (B,) int64 in 0 .. 2 * padding, and flip (B,) bool."""
        bits = hash_bits(seed, epoch, index, [3 * view, 3 * view + 1, 3 * view + 2])
        offsets = (bits[:2] * (2 * self.padding + 1)) >> BITS
        return offsets[0], offsets[1], bits[2] < round(self.flip * 2**BITS)

    def __str__(self) -> str:
        crop = f"crop (padding {self.padding} px, {self.mode})" if self.padding else ""
        flip = f"horizontal flip (p = {self.flip:g})" if self.flip else ""
        return " + ".join(part for part in (crop, flip) if part) or "none"


def crop_flip(
    x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, padding: int, mode: str = "zeros"
) -> Tensor:
    """Crop (H, W) at (dy, dx) of the padded image, then flip where asked: one gather over (B, C, H * W)."""
    b, c, h, w = x.shape
    rows = dy[:, None] + torch.arange(h, device=x.device)  # (B, H), in the padded image
    cols = dx[:, None] + torch.arange(w, device=x.device)  # (B, W)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    if mode == "reflect":
        if padding >= min(h, w):
            raise ValueError(
                f"reflect padding of {padding} px needs images larger than {h}x{w}: use mode='zeros'"
            )
        rows, cols, width = _mirror(rows - padding, h), _mirror(cols - padding, w), w
        source = x.contiguous()
    else:
        width = w + 2 * padding
        source = x.new_zeros(b, c, h + 2 * padding, width)
        source[:, :, padding : padding + h, padding : padding + w] = x
    flat = (rows[:, :, None] * width + cols[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
    return source.view(b, c, -1).gather(2, flat).view(b, c, h, w)


def _mirror(at: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - at.abs()).abs()
