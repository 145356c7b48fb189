"""What a registered method name stands for, and what a strategy builds its method from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from kdtoolkit.core.method import Method
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import keyword_defaults


@dataclass(frozen=True)
class MethodSpec:
    """What a registered method name stands for.

    Attributes:
        losses: Its losses and their default weights (numbers or schedules).
        title: One line with the paper and its year.
    """

    losses: dict[str, LossWeight]
    title: str


@dataclass(frozen=True)
class StrategySpec(MethodSpec):
    """A method that is made by a build function, usually of several networks.

    Its losses are terms of the method that `build` returns, not `DistillationLoss` objects.

    Attributes:
        build: `build(given: StrategyInputs, *, options) -> Method`.
        needs_teacher: Whether it needs a teacher.
    """

    build: Callable[..., Method]
    needs_teacher: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its options and their defaults: the keyword-only parameters of `build`."""
        return keyword_defaults(self.build)


class NetworkMaker(Protocol):
    """Makes a further network of a strategy."""

    def __call__(self, k: int, spec: Any = None) -> nn.Module:
        """Make network number k.

        Args:
            k: 1, 2, ...; number 0 is the student.
            spec: A timm name or a module; None is the student's architecture.

        Returns:
            The network, with weights of its own.
        """
        ...


@dataclass
class StrategyInputs:
    """What a strategy builds its method from.

    Attributes:
        student: The first network, tapped.
        teachers: Frozen teachers; most strategies have none.
        weights: Every term of the strategy -> number or schedule; 0 for a term that
            `losses={...}` leaves out.
        image: Height and width of the images in pixels; None where they are not known.
        preprocess: Input normalisation and resizing of the student.
        make_network: `make_network(k)` is network number k = 1, 2, ... of the student's
            architecture, `make_network(k, spec)` that of a timm name or a module, with weights of
            its own.
    """

    student: Taps
    teachers: Sequence[Frozen]
    weights: Mapping[str, LossWeight]
    image: tuple[int, int] | None
    preprocess: Preprocess
    make_network: NetworkMaker
