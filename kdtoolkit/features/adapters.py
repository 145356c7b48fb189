"""Trainable parts that stand between two networks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.types import Shape


def as_shape(sizes: Sequence[int]) -> Shape:
    """A Shape from a Shape or a plain tuple (C, H, W), (L, C) or (C,), without the batch."""
    return sizes if isinstance(sizes, Shape) else Shape(tuple(int(s) for s in sizes))


def as_map(feature: Tensor, shape: Shape) -> Tensor:
    """Any layout as a map (B, C, H, W); class tokens are left out, a vector is a map of one position."""
    if shape.layout == "NCHW":
        return feature
    if shape.layout == "NHWC":
        return feature.permute(0, 3, 1, 2)
    if shape.layout == "NC":
        return feature[:, :, None, None]
    if shape.layout == "windows":  # (B rows columns, h w, C)
        (rows, columns), (height, width) = shape.windows, shape.grid
        parts = feature.unflatten(1, (height // rows, width // columns)).unflatten(
            0, (-1, rows, columns)
        )
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    positions = _sequence(feature, shape)[:, shape.prefix :]
    if shape.order is not None:
        positions = positions[:, _index(shape.order, feature.device)]
    return positions.transpose(1, 2).unflatten(2, shape.grid)


def from_map(feature: Tensor, shape: Shape, tokens: Tensor | None = None) -> Tensor:
    """The way back: a map (B, C, H, W) in the layout of `shape`; `tokens` (B, prefix, C) go in front of positions."""
    if shape.layout == "NCHW":
        return feature
    if shape.layout == "NHWC":
        return feature.permute(0, 2, 3, 1)
    if shape.layout == "NC":
        return feature.mean((2, 3))
    if shape.layout == "windows":
        (rows, columns), (height, width) = shape.windows, shape.grid
        parts = feature.unflatten(3, (columns, width // columns)).unflatten(
            2, (rows, height // rows)
        )
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
    positions = feature.flatten(2).transpose(1, 2)
    if shape.order is not None:
        positions = positions[:, _index(_inverse(shape.order), feature.device)]
    sequence = positions if tokens is None else torch.cat([tokens, positions], dim=1)
    return sequence.transpose(1, 2) if shape.layout == "NCL" else sequence


def _sequence(feature: Tensor, shape: Shape) -> Tensor:
    """(B, L, C)."""
    return feature.transpose(1, 2) if shape.layout == "NCL" else feature


@functools.lru_cache(64)
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(order, device=device)


@functools.lru_cache(64)
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


class Adapter(nn.Module):
    """One network's feature in the shape of another's: 1x1 convolution and resizing, between any two layouts.

    src_shape, dst_shape  Shape, or a plain (C, H, W), (L, C) or (C,), without the batch
    resize                "pool": a smaller grid by adaptive average pooling, a larger one by bilinear interpolation;
                          "interpolate": both by interpolation, antialiased where the grid shrinks. A grid that shrinks
                          one way and grows the other is always interpolated
    in, out               features in the layouts of the two shapes

    Nothing is learned where nothing differs: equal channels need no convolution, equal grids no resizing, equal shapes
    make it the identity. Class tokens come from the source's own where their number is equal, else from its first
    class token (from its mean over positions where it has none) and a learned offset for each. The convolution has no
    bias; it starts as an orthogonal map, so that a feature keeps its scale.
    """

    def __init__(self, src_shape: Sequence[int], dst_shape: Sequence[int], *, resize: str = "pool"):
        super().__init__()
        if resize not in ("pool", "interpolate"):
            raise ValueError(f"resize is {resize!r}; allowed: 'pool', 'interpolate'")
        self.src, self.dst, self.resize = as_shape(src_shape), as_shape(dst_shape), resize
        self.proj: nn.Module = nn.Identity()
        self.token_proj: nn.Module | None = None
        self.token_offset: nn.Parameter | None = None
        if self.src.channels != self.dst.channels:
            conv = nn.Conv2d(self.src.channels, self.dst.channels, 1, bias=False)
            nn.init.orthogonal_(conv.weight)
            self.proj = conv
        if self.dst.prefix and self.src.channels != self.dst.channels:
            self.token_proj = nn.Linear(self.src.channels, self.dst.channels)
        if self.dst.prefix and self.src.prefix != self.dst.prefix:
            self.token_offset = nn.Parameter(torch.zeros(self.dst.prefix, self.dst.channels))

    @property
    def is_identity(self) -> bool:
        return self.src.like(self.dst)

    def forward(self, feature: Tensor) -> Tensor:
        if self.is_identity:
            return feature
        x = as_map(feature, self.src)
        shrinks = x.shape[2] * x.shape[3] >= self.dst.grid[0] * self.dst.grid[1]
        x = (
            self.proj(self._resized(x)) if shrinks else self._resized(self.proj(x))
        )  # convolution on the smaller side
        return from_map(x, self.dst, self._tokens(feature) if self.dst.prefix else None)

    def _resized(self, x: Tensor) -> Tensor:
        grid = self.dst.grid
        if tuple(x.shape[2:]) == grid:
            return x
        smaller = [new <= old for new, old in zip(grid, x.shape[2:], strict=True)]
        if all(smaller) and self.resize == "pool":
            return F.adaptive_avg_pool2d(x, grid)
        return F.interpolate(x, grid, mode="bilinear", align_corners=False, antialias=any(smaller))

    def _tokens(self, feature: Tensor) -> Tensor:
        """(B, prefix, C) of the destination."""
        if self.src.prefix:
            tokens = _sequence(feature, self.src)[:, : self.src.prefix]
        else:
            tokens = as_map(feature, self.src).mean((2, 3))[:, None]
        if self.token_offset is not None:
            tokens = tokens[:, :1].expand(-1, self.dst.prefix, -1)
        tokens = tokens if self.token_proj is None else self.token_proj(tokens)
        return tokens if self.token_offset is None else tokens + self.token_offset

    def extra_repr(self) -> str:
        return f"{tuple(self.src)} {self.src.layout} -> {tuple(self.dst)} {self.dst.layout}"
