"""What a registered method name stands for: its losses and default weights, and how a strategy is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kdtoolkit.core.method import Method
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import keyword_defaults


class MethodSpec:
    """What a registered name stands for: which losses with which weights by default."""

    def __init__(self, losses: dict[str, LossWeight], title: str):
        self.losses, self.title = losses, title


@dataclass
class StrategyInputs:
    """What a strategy builds its Method from.

    student   the first network, tapped;  teachers  frozen ones, none for most strategies
    weights   {term: number or schedule}, every term of the strategy; 0 for one that was left out of losses={...}
    another   (k, spec=None) -> network number k = 1, 2, ... of the team: the student's architecture, or that of `spec`
              (a name or a module), with weights of its own
    """

    student: Taps
    teachers: Sequence[Frozen]
    weights: Mapping[str, LossWeight]
    image: tuple[int, int] | None
    preprocess: Preprocess
    another: Callable[..., nn.Module]


class StrategySpec(MethodSpec):
    """A name for networks that are trained together: `build(given, *, options) -> Method`. Its losses are terms of that
    Method, not Objectives. `options` holds their defaults by name."""

    def __init__(
        self,
        losses: dict[str, LossWeight],
        title: str,
        build: Callable[..., Method],
        needs_teacher: bool,
    ):
        super().__init__(losses, title)
        self.build, self.needs_teacher, self.options = build, needs_teacher, keyword_defaults(build)
