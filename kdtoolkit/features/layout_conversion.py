"""Convert features between layouts: any layout -> a map (B, C, H, W), and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kdtoolkit.types import Shape


def as_shape(sizes: Sequence[int]) -> Shape:
    """A Shape from a Shape, or from plain (C, H, W), (L, C) or (C,), without the batch.

    Args:
        sizes: The Shape, or the plain sizes.

    Returns:
        A Shape as it is; plain sizes as a new Shape.

    Raises:
        ValueError: If there are not one to three plain sizes.
    """
    return sizes if isinstance(sizes, Shape) else Shape(tuple(int(size) for size in sizes))


def as_map(feature: Tensor, shape: Shape) -> Tensor:
    """Lay a feature out as a map.

    Args:
        feature: The feature in the layout of `shape`, with the batch.
        shape: Its shape.

    Returns:
        (B, C, H, W). Class tokens are left out; a vector is a map of one position.
    """
    if shape.layout == "NCHW":
        return feature
    if shape.layout == "NHWC":
        return feature.permute(0, 3, 1, 2)
    if shape.layout == "NC":
        return feature[:, :, None, None]
    if shape.layout == "windows":
        return _windows_to_map(feature, shape)
    positions = as_tokens(feature, shape)[:, shape.prefix :]
    if shape.order is not None:
        positions = positions[:, _index(shape.order, feature.device)]
    return torch.unflatten(positions.transpose(1, 2), 2, shape.grid)


def from_map(feature: Tensor, shape: Shape, tokens: Tensor | None = None) -> Tensor:
    """Lay a map out as another feature.

    Args:
        feature: The map (B, C, H, W), with the grid of `shape`.
        shape: The shape to make.
        tokens: Class tokens (B, prefix, C), which stand in front of the positions.

    Returns:
        The feature in the layout of `shape`, with the batch.
    """
    if shape.layout == "NCHW":
        return feature
    if shape.layout == "NHWC":
        return feature.permute(0, 2, 3, 1)
    if shape.layout == "NC":
        return feature.mean((2, 3))
    if shape.layout == "windows":
        return _map_to_windows(feature, shape)
    positions = feature.flatten(2).transpose(1, 2)
    if shape.order is not None:
        positions = positions[:, _index(_inverse(shape.order), feature.device)]
    sequence = positions if tokens is None else torch.cat([tokens, positions], dim=1)
    return sequence.transpose(1, 2) if shape.layout == "NCL" else sequence


def as_tokens(feature: Tensor, shape: Shape) -> Tensor:
    """A feature of layout "NLC" or "NCL" as tokens (B, L, C).

    Args:
        feature: The feature, (B, L, C) or (B, C, L).
        shape: Its shape, of which the layout is read.

    Returns:
        Tokens (B, L, C), class tokens among them.
    """
    return feature.transpose(1, 2) if shape.layout == "NCL" else feature


def _windows_to_map(feature: Tensor, shape: Shape) -> Tensor:
    (rows, columns), (height, width) = shape.windows, shape.grid
    # (B rows columns, h w, C) -> (B rows columns, h, w, C) -> (B, rows, columns, h, w, C)
    windows = torch.unflatten(feature, 1, (height // rows, width // columns))
    windows = torch.unflatten(windows, 0, (-1, rows, columns))
    # (B, C, rows, h, columns, w) -> (B, C, H, W)
    return windows.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _map_to_windows(feature: Tensor, shape: Shape) -> Tensor:
    (rows, columns), (height, width) = shape.windows, shape.grid
    # (B, C, H, W) -> (B, C, rows, h, columns, w)
    windows = torch.unflatten(feature, 3, (columns, width // columns))
    windows = torch.unflatten(windows, 2, (rows, height // rows))
    # (B, rows, columns, h, w, C) -> (B rows columns, h w, C)
    return windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


@functools.lru_cache(64)
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(order, device=device)


@functools.lru_cache(64)
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
