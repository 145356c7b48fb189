"""What the dimensions of a feature mean: maps, tokens with or without class tokens, windows; from a trace."""

from __future__ import annotations

import math
from typing import Any

import torch

from kdtoolkit.features.tracing import Trace
from kdtoolkit.types import Shape

TOLERANCE = 0.35  # largest |log| of a grid's aspect over the image's


def layout(
    tr: Trace,
    sizes: tuple[int, ...],
    channels: int | None = None,
    stride: float | None = None,
    name: str = "",
) -> Shape | None:
    """The Shape of a feature with sizes (B, ...), or None where it is none.

    channels, stride  what the model's own table says of it, if anything
    name              the module that returned it
    """
    batch, *rest = sizes
    if batch != tr.x.shape[0]:
        return _windows(tr, batch, tuple(rest))
    if len(rest) == 1:
        return Shape(tuple(rest), "NC")
    if len(rest) == 3:
        return _map(tr, tuple(rest), channels, stride)
    if len(rest) != 2:
        return None
    first, last = (channels in (None, rest[i]) for i in (0, 1))
    shape = _tokens(tr, rest[0], stride) if last or not first else None
    if shape is not None:
        grid, prefix = shape
        return Shape(tuple(rest), "NLC", grid, prefix, _order(tr, rest[0] - prefix, name))
    shape = _tokens(tr, rest[1], stride) if first else None
    return None if shape is None else Shape(tuple(rest), "NCL", *shape)


def _off(tr: Trace, grid: tuple[int, ...], stride: float | None = None) -> float:
    """How far a grid is from the image's aspect, and from its size over `stride`."""
    if min(grid) < 1:
        return math.inf
    height, width = tr.x.shape[2:]
    off = abs(math.log(grid[0] / grid[1] * width / height))
    return off + (abs(math.log(grid[0] * stride / height)) if stride else 0.0)


def _map(tr: Trace, sizes: tuple[int, ...], channels: int | None, stride: float | None) -> Shape:
    first, last = (channels in (None, sizes[i]) for i in (0, 2))
    if (
        first == last
    ):  # both or neither fit: what looks more like the image, then what the model says
        off_first, off_last = _off(tr, sizes[1:], stride), _off(tr, sizes[:2], stride)
        said: Any = getattr(tr.model, "output_fmt", None)
        equal = abs(off_first - off_last) < 1e-6
        last = getattr(said, "value", said) == "NHWC" if equal else off_last < off_first
    elif first:
        last = False
    return Shape(sizes, "NHWC" if last else "NCHW")


def _tokens(tr: Trace, count: int, stride: float | None) -> tuple[tuple[int, int], int] | None:
    """The grid of that many tokens, and how many of them stand in front of it."""
    height, width = tr.x.shape[2:]
    said = getattr(tr.model, "num_prefix_tokens", 0)
    for prefix in dict.fromkeys([said if isinstance(said, int) else 0, 0, 1, 2, 5]):
        positions = count - prefix
        if positions < 1:
            continue
        grids = (
            [(f(height / stride), f(width / stride)) for f in (math.ceil, int)] if stride else []
        )
        rows = round(math.sqrt(positions * height / width))
        grids += [(rows, positions // rows)] if rows else []
        for grid in grids:
            if grid[0] * grid[1] == positions and _off(tr, grid) < TOLERANCE:
                return grid, prefix
    return None


def _order(tr: Trace, positions: int, name: str) -> tuple[int, ...] | None:
    """Hiera keeps its tokens mask unit by mask unit and has a method that tells where they belong."""
    reroll: Any = next((m.reroll for m in tr.model.modules() if hasattr(m, "reroll")), None)
    number = name.rpartition(".")[2]
    if reroll is None or not number.isdecimal():
        return None
    tokens = reroll(
        torch.arange(positions, dtype=torch.float32, device="cpu").view(1, -1, 1), int(number)
    ).flatten()
    order = tuple(map(int, tokens.tolist()))
    return None if order == tuple(range(positions)) else order


def _windows(tr: Trace, batch: int, sizes: tuple[int, ...]) -> Shape | None:
    """Tokens of square windows that follow each other in the batch, as TNT's pixels of a patch."""
    count, left = divmod(batch, tr.x.shape[0])
    if left or len(sizes) != 2:
        return None
    across, inside = math.isqrt(count), math.isqrt(sizes[0])
    if across**2 != count or inside**2 != sizes[0] or _off(tr, (across, across)) > TOLERANCE:
        return None
    return Shape(sizes, "windows", (across * inside,) * 2, windows=(across, across))
