"""From method names, weights and options to checked losses, before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtoolkit import losses as _losses  # noqa: F401  (registers every loss)
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.schedules import check_loss_weight
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import keyword_options, suggestion
from kdtoolkit.utils.validation import describe_value, plain_scalar

MethodSelection = str | Sequence[str | DistillationLoss]
ARGUMENT_SIMILARITY = (
    0.75  # from here an unknown option is taken for a misspelt argument; 1 is equal
)


@dataclass(frozen=True)
class ResolvedLosses:
    """The losses of a run with their weights and options, all checked.

    Attributes:
        weights: Name of a loss (of a strategy: of one of its terms) and its weight, a number or a
            schedule. The total is their weighted sum.
        options: Options by name; each is taken by at least one of the losses, or by the strategy.
        strategy: The strategy, or None for losses between one student and its teachers.
        loss_objects: Losses that were given as objects, by name.
    """

    weights: Mapping[str, LossWeight]
    options: Mapping[str, Any]
    strategy: StrategySpec | None
    loss_objects: Mapping[str, DistillationLoss]

    def options_of(self, loss: str) -> dict[str, Any]:
        """The options that a registered loss takes, of those that were given.

        Args:
            loss: Name of the registered loss.

        Returns:
            Options by name; empty where it takes none of them.

        Raises:
            ValueError: If no loss is registered under this name.
        """
        allowed = keyword_options(LOSSES[loss].__init__)
        return {name: value for name, value in self.options.items() if name in allowed}

    def names_to_build(self) -> list[str]:
        """Names of the registered losses; those that were given as objects are built already."""
        return [name for name in self.weights if name not in self.loss_objects]

    def losses_with_teacher(self) -> list[str]:
        """Names of the losses that read a teacher; empty for a strategy, which says so itself."""
        if self.strategy is not None:
            return []
        return [name for name in self.weights if self._loss(name).needs_teacher]

    def reads_features(self) -> bool:
        """Whether a registered loss compares features, so that `layers` has an effect."""
        return self.strategy is None and any(LOSSES[n].needs_taps for n in self.names_to_build())

    def _loss(self, name: str) -> DistillationLoss | type[DistillationLoss]:
        return self.loss_objects[name] if name in self.loss_objects else LOSSES[name]


def resolve_losses(
    method: MethodSelection,
    losses: Mapping[str, LossWeight] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    argument_names: Sequence[str] = (),
) -> ResolvedLosses:
    """Find the losses of a method, and check names, weights and options.

    Args:
        method: A registered name, several names, or losses that are already built.
        losses: Weight of each loss, the whole sum; default the method's own.
        options: What the losses, or the strategy, take: temperature, reset, detach, hint, p, ...
        argument_names: Further names that may have been meant by an unknown option.

    Returns:
        The losses, ready for `create_method`.

    Raises:
        ValueError: For an unknown method, loss or option (with the nearest names), for a weight
            that is no number from 0 and no schedule, if all weights are 0, or if a strategy stands
            beside other names.
    """
    strategy = find_strategy(method)
    loss_objects = _loss_objects(method)
    if losses is not None and not isinstance(losses, Mapping):
        raise ValueError(
            f"losses={describe_value(losses)}: a dictionary of losses and weights, such as "
            "{'ce': 0.1, 'kd': 0.9}"
        )
    weights = default_losses(method) if losses is None else dict(losses)
    for name in loss_objects:
        weights.setdefault(name, 1.0)
    for name, weight in weights.items():
        if name not in loss_objects:
            _check_loss_name(name, strategy)
        _check_weight(name, weight)
        weights[name] = plain_scalar(weight)  # type: ignore[assignment]
    if all(not callable(weight) and weight == 0 for weight in weights.values()):
        raise ValueError(f"losses={weights}: every weight is zero, nothing would be trained")
    given = dict(options or {})
    _check_options(given, weights, strategy, argument_names)
    return ResolvedLosses(weights, given, strategy, loss_objects)


def default_losses(method: MethodSelection) -> dict[str, LossWeight]:
    """The losses of a method and their default weights.

    Args:
        method: A registered name, several names, or losses that are already built.

    Returns:
        Weights by loss; of several names all their losses, one that two names share with the weight
        of the first. A loss that is already built has weight 1, beside a cross-entropy of weight 1.

    Raises:
        ValueError: For an unknown name, with the nearest ones, or an empty list.
    """
    parts = _parts(method)
    if not parts:
        raise ValueError(f"method=[] names nothing; known: {', '.join(METHODS.names())}")
    find_strategy(method)
    weights: dict[str, LossWeight] = {}
    for part in parts:
        if isinstance(part, DistillationLoss):
            weights.setdefault("ce", 1.0)
            weights[loss_name(part)] = 1.0
        else:
            weights = {**METHODS[part].losses, **weights}
    return weights


def find_strategy(method: MethodSelection) -> StrategySpec | None:
    """The strategy of that name.

    Args:
        method: A registered name, several names, or losses that are already built.

    Returns:
        The strategy, or None where no name stands for one.

    Raises:
        ValueError: If a strategy stands beside other names.
    """
    parts = _parts(method)
    for part in parts:
        spec = METHODS[part] if isinstance(part, str) and part in METHODS else None
        if not isinstance(spec, StrategySpec):
            continue
        if len(parts) > 1:
            raise ValueError(
                f"method={parts!r}: {part!r} is a strategy, which builds its own networks and "
                "cannot be combined with other names; pass what else joins them as callbacks=[...]"
            )
        return spec
    return None


def method_options(method: str) -> list[str]:
    """Names of the options of a registered method.

    Args:
        method: Its name.

    Returns:
        The options of the strategy, or of all its losses.

    Raises:
        ValueError: For an unknown name, with the nearest ones.
    """
    strategy = find_strategy(method)
    return list(strategy.options) if strategy else _options_of_losses(default_losses(method))


def loss_name(loss: DistillationLoss) -> str:
    """The name under which a loss is registered; for others the class name in lower case.

    Args:
        loss: The loss.

    Returns:
        The name.
    """
    return getattr(loss, "registered", type(loss).__name__.lower())


def _parts(method: MethodSelection) -> list[str | DistillationLoss]:
    """The names and objects of a selection, checked to be such, each once."""
    if not isinstance(method, (str, list, tuple)):
        raise ValueError(
            f"method={describe_value(method)}: a name of list_methods(), a list of names or "
            f"DistillationLoss objects, or a Method{_class_hint(method)}"
        )
    parts = [method] if isinstance(method, str) else list(method)
    for number, part in enumerate(parts):
        if not isinstance(part, (str, DistillationLoss)):
            raise ValueError(
                f"method holds {describe_value(part)}: names and DistillationLoss objects are "
                f"allowed{_class_hint(part)}"
            )
        if any(part is other or part == other for other in parts[:number]):
            raise ValueError(f"method names {describe_value(part)} twice: name it once")
    return parts


def _class_hint(given: object) -> str:
    """What to write in place of a class of losses."""
    if not (isinstance(given, type) and issubclass(given, DistillationLoss)):
        return ""
    name = getattr(given, "registered", None)
    by_name = "" if name is None else f"its name {name!r}, or "
    return f". {given.__name__} is a class: give {by_name}an object, made by calling it"


def _loss_objects(method: MethodSelection) -> dict[str, DistillationLoss]:
    given = [part for part in _parts(method) if isinstance(part, DistillationLoss)]
    names = [loss_name(loss) for loss in given]
    if len(set(names)) < len(names):
        raise ValueError(f"several of the given losses are named alike: {', '.join(names)}")
    repeated = [name for name in names if name in _parts(method)]
    if repeated:
        raise ValueError(
            f"method holds the name {repeated[0]!r} and an object of this loss: leave one of them "
            "out"
        )
    return dict(zip(names, given, strict=True))


def _check_loss_name(name: str, strategy: StrategySpec | None) -> None:
    if strategy is None:
        LOSSES[name]
    elif name not in strategy.losses:
        hint = suggestion(str(name), strategy.losses) or "."
        raise ValueError(
            f"unknown loss {name!r}{hint} This method has: {', '.join(strategy.losses)}"
        )


def _check_weight(name: str, weight: object) -> None:
    try:
        check_loss_weight(weight)
    except ValueError as error:
        raise ValueError(
            f"the weight of loss {name!r} is {describe_value(weight)}: a number >= 0, or a "
            "schedule (kdtoolkit.schedules), which is an object that a Clock can be passed to"
        ) from error


def _check_options(
    options: Mapping[str, Any],
    losses: Iterable[str],
    strategy: StrategySpec | None,
    argument_names: Sequence[str],
) -> None:
    allowed = list(strategy.options) if strategy is not None else _options_of_losses(losses)
    unknown = [name for name in options if name not in allowed]
    if not unknown:
        return
    for name in unknown:
        near = difflib.get_close_matches(name, argument_names, 1, cutoff=ARGUMENT_SIMILARITY)
        if near:
            raise ValueError(f"unknown argument {name!r}; did you mean {near[0]!r}?")
    hint = suggestion(unknown[0], [*allowed, *argument_names]) or "."
    raise ValueError(
        f"unknown option {unknown[0]!r} for the losses {', '.join(losses)}{hint} "
        f"Options of these losses: {', '.join(allowed) or 'none'}"
    )


def _options_of_losses(losses: Iterable[str]) -> list[str]:
    classes = [LOSSES[name] for name in losses if name in LOSSES]
    return sorted({option for cls in classes for option in keyword_options(cls.__init__)})
