"""What the dimensions of a feature mean: maps, tokens with or without class tokens, windows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.types import Shape

ASPECT_TOLERANCE = 0.35  # largest |log| of a grid's aspect ratio over the image's
PREFIX_COUNTS = (0, 1, 2, 5)  # class, register and distillation tokens that networks have


def infer_shape(
    trace: ModelTrace,
    sizes: tuple[int, ...],
    channels: int | None = None,
    stride: float | None = None,
    module: str = "",
) -> Shape | None:
    """Infer the layout of a feature from its sizes.

    Args:
        trace: Trace of the model that returned it.
        sizes: Its sizes (B, ...).
        channels: Number of channels that the model's own table gives it, if any.
        stride: Image height over feature height that the model's own table gives it, if any.
        module: Name of the module that returned it.

    Returns:
        Its Shape, without the batch; None where it is no feature of the image.
    """
    batch, *rest = sizes
    if batch != trace.x.shape[0]:
        return _window_shape(trace, batch, tuple(rest))
    if len(rest) == 1:
        return Shape(tuple(rest), "NC")
    if len(rest) == 2:
        return _token_shape(trace, (rest[0], rest[1]), channels, stride, module)
    if len(rest) == 3:
        return _map_shape(trace, (rest[0], rest[1], rest[2]), channels, stride)
    return None


def _map_shape(
    trace: ModelTrace, sizes: tuple[int, int, int], channels: int | None, stride: float | None
) -> Shape:
    """(C, H, W) or (H, W, C)."""
    first_fits, last_fits = channels in (None, sizes[0]), channels in (None, sizes[2])
    if first_fits != last_fits:
        return Shape(sizes, "NHWC" if last_fits else "NCHW")
    # both or neither fit: what looks more like the image, then what the model says
    distance_first = _distance_to_image(trace, sizes[1:], stride)
    distance_last = _distance_to_image(trace, sizes[:2], stride)
    if abs(distance_first - distance_last) < 1e-6:
        declared: object = getattr(trace.model, "output_fmt", None)
        channels_last = getattr(declared, "value", declared) == "NHWC"
    else:
        channels_last = distance_last < distance_first
    return Shape(sizes, "NHWC" if channels_last else "NCHW")


def _token_shape(
    trace: ModelTrace,
    sizes: tuple[int, int],
    channels: int | None,
    stride: float | None,
    module: str,
) -> Shape | None:
    """(L, C) or (C, L)."""
    first_fits, last_fits = (channels in (None, size) for size in sizes)
    if last_fits or not first_fits:
        found = _find_token_grid(trace, sizes[0], stride)
        if found is not None:
            grid, prefix = found
            return Shape(sizes, "NLC", grid, prefix, _token_order(trace, sizes[0] - prefix, module))
    found = _find_token_grid(trace, sizes[1], stride) if first_fits else None
    return None if found is None else Shape(sizes, "NCL", *found)


def _window_shape(trace: ModelTrace, batch: int, sizes: tuple[int, ...]) -> Shape | None:
    """Tokens of square windows that follow each other in the batch, as TNT's pixels of a patch."""
    count, remainder = divmod(batch, trace.x.shape[0])
    if remainder or len(sizes) != 2:
        return None
    across, inside = math.isqrt(count), math.isqrt(sizes[0])
    if across**2 != count or inside**2 != sizes[0]:
        return None
    if _distance_to_image(trace, (across, across)) > ASPECT_TOLERANCE:
        return None
    return Shape(sizes, "windows", (across * inside,) * 2, windows=(across, across))


def _distance_to_image(
    trace: ModelTrace, grid: tuple[int, int], stride: float | None = None
) -> float:
    """How far a grid is from the image's aspect ratio, and from its size over `stride`; in logs."""
    if min(grid) < 1:
        return math.inf
    height, width = trace.x.shape[2:]
    distance = abs(math.log(grid[0] / grid[1] * width / height))
    return distance + (abs(math.log(grid[0] * stride / height)) if stride else 0.0)


def _find_token_grid(
    trace: ModelTrace, tokens: int, stride: float | None
) -> tuple[tuple[int, int], int] | None:
    """The grid of that many tokens, and how many tokens stand in front of it."""
    declared = getattr(trace.model, "num_prefix_tokens", 0)
    prefixes = [declared if isinstance(declared, int) else 0, *PREFIX_COUNTS]
    for prefix in dict.fromkeys(prefixes):
        positions = tokens - prefix
        if positions < 1:
            continue
        for grid in _candidate_grids(trace, positions, stride):
            fits = grid[0] * grid[1] == positions
            if fits and _distance_to_image(trace, grid) < ASPECT_TOLERANCE:
                return grid, prefix
    return None


def _candidate_grids(
    trace: ModelTrace, positions: int, stride: float | None
) -> list[tuple[int, int]]:
    height, width = trace.x.shape[2:]
    grids: list[tuple[int, int]] = []
    if stride:
        grids.append((math.ceil(height / stride), math.ceil(width / stride)))
        grids.append((int(height / stride), int(width / stride)))
    rows = round(math.sqrt(positions * height / width))
    if rows:
        grids.append((rows, positions // rows))
    return grids


def _token_order(trace: ModelTrace, positions: int, module: str) -> tuple[int, ...] | None:
    """Where each position of the grid stands among the tokens; None is row by row.

    Hiera keeps its tokens mask unit by mask unit; its `reroll(tokens, block number)` sorts them.
    """
    rerolls = [getattr(module, "reroll", None) for module in trace.model.modules()]
    reroll: Callable[[Tensor, int], Tensor] | None = next(filter(None, rerolls), None)
    block_number = module.rpartition(".")[2]
    if reroll is None or not block_number.isdecimal():
        return None
    numbers = torch.arange(positions, dtype=torch.float32, device="cpu").view(1, -1, 1)
    tokens = reroll(numbers, int(block_number)).flatten()
    order = tuple(int(token) for token in tokens.tolist())
    return None if order == tuple(range(positions)) else order
