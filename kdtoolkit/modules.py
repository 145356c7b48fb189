"""Trainable parts that stand between two networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .types import Shape


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
    return feature[:, shape.prefix :].transpose(1, 2).unflatten(2, shape.grid)


def from_map(feature: Tensor, shape: Shape, tokens: Tensor | None = None) -> Tensor:
    """The way back: a map (B, C, H, W) in the layout of `shape`; `tokens` (B, prefix, C) go in front of positions."""
    if shape.layout == "NCHW":
        return feature
    if shape.layout == "NHWC":
        return feature.permute(0, 2, 3, 1)
    if shape.layout == "NC":
        return feature.mean((2, 3))
    positions = feature.flatten(2).transpose(1, 2)
    return positions if tokens is None else torch.cat([tokens, positions], dim=1)


class Adapter(nn.Module):
    """One network's feature in the shape of another's: 1x1 convolution and adaptive pooling, between any two layouts.

    src_shape, dst_shape  Shape, or a plain (C, H, W), (L, C) or (C,), without the batch
    in, out               features in the layouts of the two shapes

    Nothing is learned where nothing differs: equal channels need no convolution, equal grids no resizing, equal shapes
    make it the identity. A smaller grid is reached by adaptive average pooling, a larger one by bilinear interpolation.
    Class tokens come from the source's own where their number is equal, else from its mean over positions. The
    convolution has no bias; it starts as an orthogonal map, so that a feature keeps its scale.
    """

    def __init__(self, src_shape: Sequence[int], dst_shape: Sequence[int]):
        super().__init__()
        self.src, self.dst = as_shape(src_shape), as_shape(dst_shape)
        self.proj: nn.Module = nn.Identity()
        self.token_proj: nn.Module | None = None
        if self.src.channels != self.dst.channels:
            conv = nn.Conv2d(self.src.channels, self.dst.channels, 1, bias=False)
            nn.init.orthogonal_(conv.weight)
            self.proj = conv
        if self.dst.prefix and self.src.channels != self.dst.channels:
            self.token_proj = nn.Linear(self.src.channels, self.dst.channels)

    @property
    def is_identity(self) -> bool:
        same = self.src == self.dst and self.src.layout == self.dst.layout and self.src.prefix == self.dst.prefix
        return same and isinstance(self.proj, nn.Identity)

    def forward(self, feature: Tensor) -> Tensor:
        if self.is_identity:
            return feature
        x = as_map(feature, self.src)
        shrinks = x.shape[2] * x.shape[3] >= self.dst.grid[0] * self.dst.grid[1]
        x = self.proj(self._resize(x)) if shrinks else self._resize(self.proj(x))  # the convolution on the smaller side
        return from_map(x, self.dst, self._tokens(feature) if self.dst.prefix else None)

    def _resize(self, x: Tensor) -> Tensor:
        rows, columns = self.dst.grid
        if tuple(x.shape[2:]) == (rows, columns):
            return x
        if x.shape[2] >= rows and x.shape[3] >= columns:
            return F.adaptive_avg_pool2d(x, (rows, columns))
        return F.interpolate(x, (rows, columns), mode="bilinear", align_corners=False)

    def _tokens(self, feature: Tensor) -> Tensor:
        if self.src.prefix == self.dst.prefix:
            tokens = feature[:, : self.src.prefix]
        else:
            mean = as_map(feature, self.src).mean((2, 3))
            tokens = mean[:, None].expand(-1, self.dst.prefix, -1)
        return tokens if self.token_proj is None else self.token_proj(tokens)

    def extra_repr(self) -> str:
        return f"{tuple(self.src)} {self.src.layout} -> {tuple(self.dst)} {self.dst.layout}"
