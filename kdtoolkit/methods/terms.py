"""Weights and plan rows of the loss terms of a method."""

from __future__ import annotations

from collections.abc import Mapping

from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Clock, LossWeight
from kdtoolkit.utils.registry import suggestion
from kdtoolkit.utils.validation import describe_value


def merge_weights(
    owner: str, defaults: Mapping[str, LossWeight], given: Mapping[str, LossWeight] | None
) -> dict[str, LossWeight]:
    """Default weights of a method's terms, replaced by those that were given.

    Args:
        owner: Name of the method, for the message.
        defaults: Weight of every term.
        given: Weights by term, or None.

    Returns:
        The weight of every term, in the order of the defaults.

    Raises:
        ValueError: For a term that the method does not have, or a weight that is no number from 0
            and no schedule.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"weights of {owner} are {describe_value(given)}; allowed: a dictionary of losses and "
            "weights"
        )
    for name, weight in (given or {}).items():
        if name not in defaults:
            hint = suggestion(str(name), defaults) or "."
            raise ValueError(
                f"weights of {owner}: unknown loss {name!r}{hint} Known: {', '.join(defaults)}"
            )
        check_loss_weight(weight, f"the weight of {name!r}")
    return {**defaults, **(given or {})}


def weights_at(weights: Mapping[str, LossWeight], clock: Clock) -> dict[str, float]:
    """The weights of all terms at this moment.

    Args:
        weights: Number or schedule by term.
        clock: Position in the run.

    Returns:
        Number by term, in the same order.
    """
    return {name: weight_at(weight, clock, name) for name, weight in weights.items()}


def describe_weights(weights: Mapping[str, LossWeight]) -> dict[str, float | str]:
    """The weights of all terms as the plan prints them: numbers, or schedules as text.

    Args:
        weights: Number or schedule by term.

    Returns:
        Number or text by term, in the same order.
    """
    return {name: describe_weight(weight) for name, weight in weights.items()}


def describe_feature(end: StageBoundary) -> str:
    """Name, shape and layout of a feature as text, such as "layer2, 32x8x8 NCHW".

    Args:
        end: The end of the stage that the feature belongs to.

    Returns:
        The text; the shape in it is without the batch.
    """
    return f"{end.name}, {'x'.join(map(str, end.shape))} {end.shape.layout}"
