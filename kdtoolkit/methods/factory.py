"""Builds a Method from names and numbers, and refuses what it does not know before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kdtoolkit import losses as _objectives  # noqa: F401  (registers every loss)
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import MethodSpec, StrategyInputs, StrategySpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.features.stage_matching import pair_stages
from kdtoolkit.methods.offline import OfflineDistillation, build_losses
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.types import LossWeight, TapKey
from kdtoolkit.utils.registry import keyword_options, suggestion

if "none" not in METHODS:
    METHODS.add("none")(MethodSpec({"ce": 1.0}, "Plain training on labels, without a teacher"))

Named = str | Sequence[str | DistillationLoss]
Layers = str | Sequence[tuple[TapKey, TapKey]]


def list_methods() -> list[str]:
    """Names that `distill(method=...)` takes."""
    return METHODS.names()


def default_losses(method: Named) -> dict[str, LossWeight]:
    """The losses of a method and their default weights; of several, all of them, a loss that two share with the weight
    of the first. ValueError for a name that is not known, with the nearest ones."""
    names = [method] if isinstance(method, str) else list(method)
    if not names:
        raise ValueError(f"method=[] names nothing; known: {', '.join(list_methods())}")
    find_strategy(method)
    losses: dict[str, LossWeight] = {}
    for name in names:
        if isinstance(name, DistillationLoss):
            losses.setdefault("ce", 1.0)
            losses[_name_of(name)] = 1.0
        else:
            losses = {**METHODS[name].losses, **losses}
    return losses


def find_strategy(method: Any) -> StrategySpec | None:
    """The strategy of that name, or None; ValueError for one that stands beside other names."""
    names = [method] if isinstance(method, str) else list(method)
    found = [
        n
        for n in names
        if isinstance(n, str) and n in METHODS and isinstance(METHODS[n], StrategySpec)
    ]
    if not found:
        return None
    if len(names) > 1:
        raise ValueError(
            f"method={names!r}: {found[0]!r} builds a team of its own and stands alone; what joins networks further is "
            "passed as callbacks=[...]"
        )
    return METHODS[found[0]]  # type: ignore[return-value]


def check_losses(
    losses: Mapping[str, LossWeight],
    given: Sequence[DistillationLoss] = (),
    strategy: StrategySpec | None = None,
) -> None:
    """ValueError for an unknown loss, a weight that is no number or schedule, or nothing to train on."""
    own = {_name_of(o) for o in given}
    for name, weight in losses.items():
        if strategy is not None:
            if name not in strategy.losses:
                known = ", ".join(strategy.losses)
                raise ValueError(
                    f"unknown loss {name!r}{suggestion(name, strategy.losses) or '.'} This method has: {known}"
                )
        elif name not in own:
            LOSSES[name]
        if not callable(weight) and (
            isinstance(weight, (bool, str)) or not isinstance(weight, (int, float)) or weight < 0
        ):
            raise ValueError(
                f"the weight of loss {name!r} is {weight!r}: a number >= 0, or a schedule (kdtoolkit.schedules)"
            )
    if not losses or all(not callable(w) and w == 0 for w in losses.values()):
        raise ValueError(f"losses={dict(losses)}: every weight is zero, nothing would be trained")


def check_options(
    losses: Mapping[str, LossWeight],
    options: Mapping[str, Any],
    arguments: Sequence[str] = (),
    strategy: StrategySpec | None = None,
) -> None:
    """ValueError for an option that no loss of this run takes; `arguments` are other names that may have been meant."""
    if strategy is not None:
        allowed = list(strategy.options)
    else:
        allowed = sorted(
            {o for name in losses if name in LOSSES for o in keyword_options(LOSSES[name].__init__)}
        )
    unknown = [o for o in options if o not in allowed]
    if unknown:
        hint = suggestion(unknown[0], [*allowed, *arguments]) or "."
        raise ValueError(
            f"unknown option {unknown[0]!r} for the losses {', '.join(losses)}{hint} "
            f"Options of these losses: {', '.join(allowed) or 'none'}"
        )


def needs_teacher(losses: Iterable[str], given: Sequence[DistillationLoss] = ()) -> list[str]:
    """Names of the losses that read a teacher."""
    own = {_name_of(o): o for o in given}
    return [name for name in losses if (own[name] if name in own else LOSSES[name]).needs_teacher]


def create_method(
    method: Named,
    student: Taps,
    teachers: Sequence[Frozen] = (),
    *,
    losses: Mapping[str, LossWeight] | None = None,
    layers: Layers = "auto",
    preprocess: Preprocess | None = None,
    image: tuple[int, int] | None = None,
    another: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> Method:
    """A Method that trains `student` (Taps) from `teachers` (Frozen).

    method   registered name, several names, or Objectives that are already built
    losses   {loss: weight}, the whole sum; default the method's own
    layers   "auto" pairs stages by stride, then depth; or [(student tap, teacher tap), ...]
    another  (k, spec=None) -> a further network for a strategy; default the student's architecture, initialised anew
    options  what the losses take: temperature, reset, detach, hint, p, ...
    """
    strategy = find_strategy(method)
    if strategy is not None:
        return _team(
            strategy, student, teachers, losses, layers, preprocess, image, another, options
        )
    given = (
        [] if isinstance(method, str) else [m for m in method if isinstance(m, DistillationLoss)]
    )
    chosen = dict(losses) if losses is not None else default_losses(method)
    check_losses(chosen, given)
    check_options(chosen, options)
    if layers != "auto" and not any(LOSSES[n].needs_taps for n in chosen if n in LOSSES):
        raise ValueError(
            f"layers={layers!r} has no effect: the losses {', '.join(chosen)} read no features. Leave it out, or add a "
            "loss that does, such as at, fitnet, sp or srkd"
        )
    own = {_name_of(o): o for o in given}
    if len(own) < len(given):
        raise ValueError(
            f"several of the given objectives are named alike: {', '.join(map(_name_of, given))}"
        )
    if not teachers and any(o.needs_teacher for o in given):
        raise ValueError(
            f"the losses {', '.join(needs_teacher(own, given))} need a teacher, none was given"
        )
    names = {name: weight for name, weight in chosen.items() if name not in own}

    def options_for(name: str, cls: type[DistillationLoss]) -> dict[str, Any]:
        return {o: options[o] for o in keyword_options(cls.__init__) if o in options}

    def pairs(teacher: Frozen) -> list[tuple[TapKey, TapKey]]:
        return resolve_layer_pairs(student, teacher, layers)

    built, weights, whose = build_losses(
        names, student, teachers, LOSSES.__getitem__, pairs, options_for
    )
    for name, part in own.items():
        built[name], weights[name], whose[name] = part, chosen.get(name, 1.0), 0
    return OfflineDistillation(
        student, teachers, built, weights, preprocess=preprocess, image=image, share_teacher=whose
    )


def _team(
    strategy: StrategySpec, student: Taps, teachers: Sequence[Frozen], losses: Mapping[str, LossWeight] | None, layers: Layers,
    preprocess: Preprocess | None, image: tuple[int, int] | None, another: Callable[..., nn.Module] | None,
    options: Mapping[str, Any],
) -> Method:  # fmt: skip
    chosen = strategy.losses if losses is None else losses
    check_losses(chosen, strategy=strategy)
    check_options(chosen, options, strategy=strategy)
    if layers != "auto":
        raise ValueError(
            f"layers={layers!r} has no effect: this method pairs no features of a student and a teacher"
        )
    if strategy.needs_teacher and not teachers:
        raise ValueError(f"{strategy.title} needs a teacher, none was given")
    student.rehearse()
    weights = {name: chosen.get(name, 0.0) for name in strategy.losses}
    pre = preprocess or Preprocess.of(student.model, image)
    return strategy.build(
        StrategyInputs(student, teachers, weights, image, pre, another or _copies(student.model)),
        **options,
    )


def _copies(net: nn.Module) -> Callable[..., nn.Module]:
    def another(k: int, spec: Any = None) -> nn.Module:
        if isinstance(spec, nn.Module):
            return spec
        if spec is not None:
            raise ValueError(
                f"network {k} is given as {spec!r}: pass an nn.Module, only distill() builds by name"
            )
        return reinitialised_copy(net, k)

    return another


def resolve_layer_pairs(
    student: Taps, teacher: Taps, layers: Layers
) -> list[tuple[TapKey, TapKey]]:
    """Pairs of taps; every tap is checked."""
    if layers == "auto":
        found = pair_stages(student.stages, teacher.stages)
        if not found:
            side = student if not student.stages else teacher
            raise ValueError(
                f"no stages were found in {type(side.model).__name__}: name the taps with "
                "layers=[(student tap, teacher tap), ...]"
            )
        return list(found)
    if not isinstance(layers, (tuple, list)) or not all(map(_is_pair, layers)):
        raise ValueError(
            f"layers={layers!r}: 'auto' or a list of (student tap, teacher tap): stage numbers or names"
        )
    for s, t in layers:
        student.end(s)
        teacher.end(t)
    return [(student.key(s), teacher.key(t)) for s, t in layers]


def _is_pair(taps: Any) -> bool:
    return (
        isinstance(taps, (tuple, list))
        and len(taps) == 2
        and all(isinstance(tap, (str, int)) for tap in taps)
    )


def _name_of(part: DistillationLoss) -> str:
    return getattr(part, "registered", type(part).__name__.lower())
