"""From method names, weights and options to checked losses, before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtoolkit import losses as _losses  # noqa: F401  (registers every loss)
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import MethodSpec, StrategySpec
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
        weights: Name of a loss (of a strategy: of one of its terms, or of a loss beside it) and its
            weight, a number or a schedule. The total is their weighted sum.
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
        """Names of the registered losses; objects and a strategy's own terms are built already."""
        built = [*self.loss_objects, *(self.strategy.losses if self.strategy else ())]
        return [name for name in self.weights if name not in built]

    def beside_strategy(self) -> ResolvedLosses:
        """The registered losses beside the strategy, as those of one student and its teachers."""
        weights = {name: self.weights[name] for name in self.names_to_build()}
        return ResolvedLosses(weights, self.options, None, {})

    def strategy_options(self) -> dict[str, Any]:
        """The options that the strategy takes, of those that were given."""
        allowed = {} if self.strategy is None else self.strategy.options
        return {name: value for name, value in self.options.items() if name in allowed}

    def losses_with_teacher(self) -> list[str]:
        """Names of the losses that read a teacher, without the terms of a strategy."""
        names = [*self.names_to_build(), *self.loss_objects]
        return [name for name in self.weights if name in names and self._loss(name).needs_teacher]

    def reads_features(self) -> bool:
        """Whether a registered loss compares features, so that `layers` has an effect."""
        return any(LOSSES[n].needs_taps for n in self.names_to_build())

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
            that is no number from 0 and no schedule, if all weights are 0, or for two strategies,
            or loss objects beside one.
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
            check_loss_name(name, strategy)
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
        of the first. A strategy's own terms keep its weights. A loss that is already built has
        weight 1, beside a cross-entropy of weight 1.

    Raises:
        ValueError: For an unknown name, with the nearest ones, an empty list, or a name that adds
            no loss to a strategy.
    """
    parts = _parts(method)
    if not parts:
        raise ValueError(f"method=[] names nothing; known: {', '.join(METHODS.names())}")
    strategy = find_strategy(method)
    weights: dict[str, LossWeight] = {}
    for part in parts:
        if isinstance(part, DistillationLoss):
            weights.setdefault("ce", 1.0)
            weights[loss_name(part)] = 1.0
            continue
        spec = METHODS[part]
        if strategy not in (None, spec):
            _check_adds_a_loss(part, spec, strategy)
        weights = {**spec.losses, **weights}
    own = {} if strategy is None else strategy.losses
    return {**own, **weights, **own}


def find_strategy(method: MethodSelection) -> StrategySpec | None:
    """The strategy of that name.

    Args:
        method: A registered name, several names, or losses that are already built.

    Returns:
        The strategy, or None where no name stands for one.

    Raises:
        ValueError: For two strategies, or a loss object beside one.
    """
    parts = _parts(method)
    names = [part for part in parts if isinstance(part, str) and part in METHODS]
    found = {name: spec for name in names if isinstance(spec := METHODS[name], StrategySpec)}
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"method={parts!r}: {' and '.join(map(repr, found))} are strategies, which build their "
            "own networks: name one of them, beside any registered losses; pass what else joins "
            "its networks as callbacks=[...]"
        )
    name, spec = found.popitem()
    objects = [loss_name(part) for part in parts if isinstance(part, DistillationLoss)]
    if objects:
        raise ValueError(
            f"method holds {objects[0]!r} as an object: {name!r} is a strategy, which builds its "
            "own networks, and an object has the taps and adapters of one student; give its "
            "registered name"
        )
    return spec


def _check_adds_a_loss(part: str, spec: MethodSpec, strategy: StrategySpec | None) -> None:
    """ValueError for a name whose losses are all terms of the strategy beside it."""
    terms = [] if strategy is None else list(strategy.losses)
    if any(loss not in terms for loss in spec.losses):
        return
    raise ValueError(
        f"method names {part!r} beside a strategy whose own terms are {', '.join(terms)}: it adds "
        "no loss to them. Leave it out, and change their weights with losses={...}"
    )


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


def check_loss_name(name: str, strategy: StrategySpec | None) -> None:
    """Check that a loss is registered, or a term of the strategy.

    Args:
        name: Name of the loss.
        strategy: The strategy, or None.

    Raises:
        ValueError: If it is neither, with the nearest names.
    """
    if strategy is None:
        LOSSES[name]
    elif name not in strategy.losses and name not in LOSSES:
        registered = [loss for loss in LOSSES.names() if loss not in strategy.losses]
        hint = suggestion(str(name), [*strategy.losses, *registered]) or "."
        raise ValueError(
            f"unknown loss {name!r}{hint} This method has: {', '.join(strategy.losses)}; beside "
            f"them it takes {', '.join(registered)}"
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
    allowed = _options_of_losses(losses)
    if strategy is not None:
        beside = _options_of_losses(name for name in losses if name not in strategy.losses)
        allowed = list(dict.fromkeys([*strategy.options, *beside]))
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
