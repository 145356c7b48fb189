"""The registries of losses and methods, and the decorators that fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.strategy import MethodSpec, StrategySpec
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import Registry

LOSSES: Registry[type[DistillationLoss]] = Registry("loss")


METHODS: Registry[MethodSpec] = Registry("method")


def register_loss(
    name: str, *, losses: dict[str, LossWeight] | None = None, title: str = ""
) -> Any:
    """Class decorator: register an Objective as a loss, and, with `losses`, as a method with these default weights."""

    def register(cls: type[DistillationLoss]) -> type[DistillationLoss]:
        LOSSES.add(name)(cls)
        cls.registered = name  # type: ignore[attr-defined]
        if losses is not None:
            METHODS.add(name)(
                MethodSpec(losses, title or (cls.__doc__ or "").strip().split("\n")[0])
            )
        return cls

    return register


def register_strategy(
    name: str, *, losses: dict[str, LossWeight], title: str, needs_teacher: bool = False
) -> Any:
    """Function decorator: register `build(given: Given, *, options) -> Method` as a method with these terms and default
    weights. The keyword-only parameters are the options that distill() passes on."""

    def register(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS.add(name)(StrategySpec(losses, title, build, needs_teacher))
        return build

    return register
