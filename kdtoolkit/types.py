"""The four shapes of data that travel through a step: Batch, Out, Step, Clock; and Shape, what a tap measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypedDict

from torch import Tensor

TapKey = int | str


class Batch(TypedDict, total=False):
    """One batch, on the training device."""

    x: Tensor  # (B, 3, H, W) float in [0, 1], not yet normalised: each model normalises its own input
    y: Tensor  # (B,) int64 class ids
    index: (
        Tensor  # (B,) int64 row in the training set; always there (memory banks and caches need it)
    )
    views: Tensor  # (B, V, 3, H, W), only when the method asks for several views


class Out(NamedTuple):
    """What one forward of a tapped model returns."""

    logits: Tensor  # (B, C)
    feats: Mapping[TapKey, Tensor]  # stage number or tap name -> feature, in the model's own layout


class Step(NamedTuple):
    """What one forward of a method returns: weighted losses by name, logits by network, figures to log."""

    losses: dict[str, Tensor]
    logits: dict[str, Tensor]
    logs: dict[str, Tensor] = {}


@dataclasses.dataclass
class Clock:
    """Where a run stands. `step` counts batches since the start, `epoch` whole passes over the training data."""

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
        """Epochs since the start, with fraction."""
        return self.step / max(self.steps_per_epoch, 1)


LossWeight = float | Callable[[Clock], float]


class Shape(tuple[int, ...]):
    """Shape of one feature without its batch dimension; equal to the plain tuple of its sizes.

    layout    "NCHW" (C, H, W), "NHWC" (H, W, C), "NLC" (L, C) tokens, "NCL" (C, L), "NC" (C,) a vector, "windows"
              (L, C) tokens of one window, the windows of an image following each other in the batch
    grid      (rows, columns) of positions of the whole image; (1, 1) for a vector
    channels  C
    prefix    class, register and distillation tokens in front of the L - prefix positions ("NLC", "NCL")
    order     "NLC" only: where each position of the grid, row by row, stands among the tokens; None is row by row
    windows   (rows, columns) of windows in an image ("windows" only); the batch is that many times larger
    """

    layout: str
    grid: tuple[int, int]
    channels: int
    prefix: int
    order: tuple[int, ...] | None
    windows: tuple[int, int]

    def __new__(
        cls,
        sizes: tuple[int, ...],
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        order: tuple[int, ...] | None = None,
        windows: tuple[int, int] = (1, 1),
    ) -> Shape:
        self = super().__new__(cls, sizes)
        self.layout = layout or {3: "NCHW", 2: "NLC", 1: "NC"}.get(len(sizes), "?")
        if self.layout not in ("NCHW", "NHWC", "NLC", "NCL", "NC", "windows"):
            raise ValueError(
                f"feature of shape {tuple(sizes)} without batch: expected (C, H, W), (L, C) or (C,)"
            )
        self.prefix, self.order, self.windows = prefix, order, windows
        self.channels = sizes[0] if self.layout in ("NCHW", "NCL", "NC") else sizes[-1]
        if self.layout in ("NLC", "NCL", "windows"):
            self.grid = grid or _token_grid(sizes[self.layout == "NCL"], prefix)
        else:
            self.grid = {"NCHW": tuple(sizes[1:3]), "NHWC": tuple(sizes[:2]), "NC": (1, 1)}[
                self.layout
            ]  # type: ignore[assignment]
        return self

    def like(self, other: Shape) -> bool:
        """Whether a feature of this shape can stand where one of the other is expected."""
        mine, its = (
            (s.layout, s.grid, s.prefix, s.order, s.windows) if s.layout != "NC" else s.layout
            for s in (self, other)
        )
        return self == other and mine == its

    def __getnewargs__(self):  # deepcopy and pickle
        return tuple(self), self.layout, self.grid, self.prefix, self.order, self.windows


def _token_grid(tokens: int, prefix: int) -> tuple[int, int]:
    positions = tokens - prefix
    rows = math.isqrt(max(positions, 0))
    while rows > 1 and positions % rows:
        rows -= 1
    return (rows, positions // rows) if rows else (1, 1)
