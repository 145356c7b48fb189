"""Checks of what makes up the total loss: weights before training, returned losses at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.method import Method
from kdtoolkit.schedules import check_loss_weight, check_over_run
from kdtoolkit.types import Clock, Step
from kdtoolkit.utils.validation import describe_value


def check_schedules(method: Method, callbacks: Sequence[Callback], clock: Clock | None) -> None:
    """Check every weight of a run, a schedule at both ends of the run and between.

    Args:
        method: Its `loss_weights()` are read.
        callbacks: Theirs too.
        clock: The length of the run. None where it is not known yet: schedules are looked at when
            it is.

    Raises:
        ValueError: For a weight that is no number from 0, and a schedule that fails or returns such
            a number; it names the loss.
    """
    parts: list[Method | Callback] = [method, *callbacks]
    for part in parts:
        for name, weight in part.loss_weights().items():
            check_loss_weight(weight, f"the weight of loss {name!r}")
            if clock is not None:
                check_over_run(weight, clock, name)


def owner(callback: Callback) -> str:
    """A callback as a message names it.

    Args:
        callback: The callback.
    """
    return f"the callback {type(callback).__name__}"


def check_step(step: object, method: Method) -> Step:
    """Check what the forward pass of a method returned.

    Args:
        step: What it returned.
        method: The method, for the message.

    Returns:
        The step.

    Raises:
        ValueError: If it is no `Step`, or one of its losses is no scalar.
    """
    if not isinstance(step, Step):
        raise ValueError(
            f"{type(method).__name__} returned {describe_value(step)}; allowed: "
            "kdtoolkit.types.Step(losses, logits)"
        )
    check_losses(step.losses, f"the method {type(method).__name__}")
    return step


def check_losses(losses: object, owner: str) -> Mapping[str, Tensor]:
    """Check that losses are named scalars.

    Args:
        losses: What was returned.
        owner: Who returned them, such as "the callback Mine", for the message.

    Returns:
        The losses.

    Raises:
        ValueError: If they are no mapping of names and floating-point scalars.
    """
    if not isinstance(losses, Mapping):
        raise ValueError(
            f"{owner} returned {describe_value(losses)} as losses; allowed: a dictionary of named "
            "scalars, such as {'mine': loss}, or None"
        )
    for name, loss in losses.items():
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
            continue
        raise ValueError(f"{owner} returned {_describe_loss(name, loss)}")
    return losses


def _describe_loss(name: object, loss: object) -> str:
    if not isinstance(loss, Tensor):
        return (
            f"the loss {name!r} as {describe_value(loss)}; allowed: a scalar tensor that was "
            "computed from logits"
        )
    if loss.dim() == 0:
        return f"the loss {name!r} as {loss.dtype}; allowed: a floating-point scalar"
    return f"the loss {name!r} of shape {tuple(loss.shape)}; allowed: a scalar, such as its .mean()"
