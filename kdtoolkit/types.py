"""The data of a step (Batch, Out, Step, Clock) and the shape of a feature (Shape)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

if TYPE_CHECKING:  # so that the command line answers without importing torch
    from torch import Tensor

TapKey = int | str  # number of a stage, from 1 (-1 is the last), or name of a module


class Batch(TypedDict, total=False):
    """One batch, on the training device.

    Attributes:
        x: Images (B, 3, H, W), float in [0, 1]; each model normalises its own input.
        y: Class ids (B,), int64; -1 where a row has no label.
        index: Rows (B,) in the training set, int64; always there, for memory banks and caches.
        views: Augmentations (B, V, 3, H, W), only where the method reads several views.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    views: Tensor


class Out(NamedTuple):
    """What one forward pass of a network with taps returns.

    Attributes:
        logits: (B, C).
        feats: Feature of each tap by its key, in the model's own layout.
    """

    logits: Tensor
    feats: Mapping[TapKey, Tensor]


class Step(NamedTuple):
    """What one forward pass of a method returns.

    Attributes:
        losses: Weighted terms of the total, scalars by name.
        logits: Logits (B, C) by network.
        logs: Further scalars to log, by name.
    """

    losses: dict[str, Tensor]
    logits: dict[str, Tensor]
    logs: dict[str, Tensor] = {}  # noqa: RUF012 (a NamedTuple, whose default is never changed)


@dataclasses.dataclass
class Clock:
    """Position in a run.

    Attributes:
        step: Batches since the start.
        epoch: Complete passes over the training data.
        steps_per_epoch: Batches of one epoch, from 1.
        total_steps: Batches of the whole run, from 1.
    """

    step: int = 0
    epoch: int = 0
    steps_per_epoch: int = 1
    total_steps: int = 1

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0 to 1."""
        return min(self.step / max(self.total_steps, 1), 1.0)

    @property
    def epochs(self) -> float:
        """Epochs since the start, with their fraction."""
        return self.step / max(self.steps_per_epoch, 1)


LossWeight = float | Callable[[Clock], float]  # a number, or a schedule (kdtoolkit.schedules)

LAYOUTS = ("NCHW", "NHWC", "NLC", "NCL", "NC", "windows")
LAYOUT_OF_RANK = {3: "NCHW", 2: "NLC", 1: "NC"}  # where none is given
CHANNELS_FIRST = ("NCHW", "NCL", "NC")


class Shape(tuple[int, ...]):
    """Shape of one feature without its batch dimension; equal to the plain tuple of its sizes.

    Made of one to three sizes; the other arguments are the attributes of the same names. By default
    the layout is "NCHW", "NLC" or "NC" by the number of sizes, and the grid of tokens the most
    square one.

    Attributes:
        layout: "NCHW" (C, H, W); "NHWC" (H, W, C); "NLC" (L, C), tokens; "NCL" (C, L); "NC" (C,), a
            vector; "windows" (L, C), tokens of one window, where the windows of an image follow
            each other in the batch.
        grid: Rows and columns of positions of the whole image; (1, 1) for a vector.
        channels: C.
        prefix: Class, register and distillation tokens in front of the L - prefix positions ("NLC",
            "NCL").
        order: Where each position of the grid, row by row, stands among the tokens ("NLC"); None is
            row by row.
        windows: Rows and columns of windows in an image ("windows"); the batch is that many times
            larger.

    Raises:
        ValueError: If the sizes have no such layout.
    """

    layout: str
    grid: tuple[int, int]
    channels: int
    prefix: int
    order: tuple[int, ...] | None
    windows: tuple[int, int]

    def __new__(  # noqa: D102 (described in the class)
        cls,
        sizes: tuple[int, ...],
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        order: tuple[int, ...] | None = None,
        windows: tuple[int, int] = (1, 1),
    ) -> Shape:
        self = super().__new__(cls, sizes)
        self.layout = layout or LAYOUT_OF_RANK.get(len(sizes), "?")
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"feature of shape {tuple(sizes)} without batch: expected (C, H, W), (L, C) or (C,)"
            )
        self.prefix, self.order, self.windows = prefix, order, windows
        self.channels = sizes[0] if self.layout in CHANNELS_FIRST else sizes[-1]
        self.grid = _find_grid(self.layout, sizes, grid, prefix)
        return self

    def like(self, other: Shape) -> bool:
        """Whether a feature of this shape can stand where one of another is expected.

        Args:
            other: The shape that is expected.

        Returns:
            True if sizes, layout, grid, prefix, order and windows are the same; of a vector sizes
            and layout.
        """
        return self == other and self._arrangement() == other._arrangement()

    def _arrangement(self) -> tuple[Any, ...]:
        if self.layout == "NC":
            return (self.layout,)
        return self.layout, self.grid, self.prefix, self.order, self.windows

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]  # deepcopy and pickle
        return tuple(self), self.layout, self.grid, self.prefix, self.order, self.windows


def _find_grid(
    layout: str, sizes: tuple[int, ...], grid: tuple[int, int] | None, prefix: int
) -> tuple[int, int]:
    if layout == "NCHW":
        return sizes[1], sizes[2]
    if layout == "NHWC":
        return sizes[0], sizes[1]
    if layout == "NC":
        return 1, 1
    return grid or _token_grid(sizes[1] if layout == "NCL" else sizes[0], prefix)


def _token_grid(tokens: int, prefix: int) -> tuple[int, int]:
    """The most square grid that holds all tokens but the prefix."""
    positions = tokens - prefix
    rows = math.isqrt(max(positions, 0))
    while rows > 1 and positions % rows:
        rows -= 1
    return (rows, positions // rows) if rows else (1, 1)
