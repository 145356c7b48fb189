"""Builds a method from its name, the networks and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdtoolkit.core.loss import is_pair_of_taps
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import NetworkMaker, StrategyInputs, StrategySpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.features.stage_matching import pair_stages
from kdtoolkit.methods.build_losses import BuiltLosses, build_losses
from kdtoolkit.methods.offline import OfflineDistillation
from kdtoolkit.methods.resolve import (
    MethodSelection,
    ResolvedLosses,
    resolve_losses,
)
from kdtoolkit.methods.teacher_losses import LossBuilder, TakesTeacherLosses
from kdtoolkit.models.module_checks import check_readable_features
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.types import LossWeight, TapKey
from kdtoolkit.utils.validation import describe_value

LayerPairs = str | Sequence[tuple[TapKey, TapKey]]


def list_methods() -> list[str]:
    """Names that `distill(method=...)` takes, sorted."""
    return METHODS.names()


def method_needs_teacher(name: str) -> bool:
    """Whether a method learns from a frozen teacher.

    Args:
        name: Its name.

    Returns:
        False for plain training, and for networks that teach each other.
    """
    spec = METHODS[name]
    if isinstance(spec, StrategySpec):
        return spec.needs_teacher
    return any(LOSSES[loss].needs_teacher for loss in spec.losses)


def create_method(
    method: MethodSelection | ResolvedLosses,
    student: Taps,
    teachers: Sequence[Frozen] = (),
    *,
    losses: Mapping[str, LossWeight] | None = None,
    layers: LayerPairs = "auto",
    preprocess: Preprocess | None = None,
    image: tuple[int, int] | None = None,
    make_network: NetworkMaker | None = None,
    **options: Any,
) -> Method:
    """Build the method that trains a student, from teachers or with further networks.

    Args:
        method: A registered name, several names, losses that are already built, or what
            `resolve_losses` made of them.
        student: The student with its taps.
        teachers: Frozen teachers; none for most strategies.
        losses: Weight of each loss, a number or a schedule: the whole sum. Default the method's
            own.
        layers: "auto" pairs stages by stride, then by depth; or pairs (student tap, teacher tap),
            stages or names of modules.
        preprocess: Input normalisation of the student; default that of its `pretrained_cfg`.
        image: Height and width of the data in pixels, where a network's own size is fixed and
            differs.
        make_network: `(k, spec=None)` -> network k = 1, 2, ... of a strategy; default the student's
            architecture, re-initialised.
        **options: What the losses, or the strategy, take: temperature, reset, detach, hint, p, ...

    Returns:
        The method, not yet on a device.

    Raises:
        ValueError: For unknown names and options, for `layers` that no loss reads, and without a
            teacher that is needed.

    Example:
        >>> method = create_method("kd", Taps(student), [Frozen(teacher)], temperature=2.0)
    """
    resolved = _resolved(method, losses, options)
    if resolved.strategy is not None:
        _check_strategy_call(resolved, resolved.strategy, teachers, layers)
        made = _build_strategy(
            resolved, resolved.strategy, student, teachers, preprocess, image, make_network
        )
        _add_teacher_losses(made, resolved, resolved.strategy, teachers, layers)
        return made
    _check_loss_call(resolved, teachers, layers)
    built = _loss_builder(resolved, layers)(student, teachers)
    return OfflineDistillation(
        student,
        teachers,
        built.losses,
        built.weights,
        preprocess=preprocess,
        image=image,
        teacher_of=built.teacher_of,
    )


def _resolved(
    method: MethodSelection | ResolvedLosses,
    losses: Mapping[str, LossWeight] | None,
    options: Mapping[str, Any],
) -> ResolvedLosses:
    if not isinstance(method, ResolvedLosses):
        return resolve_losses(method, losses, options)
    if losses is not None or options:
        raise ValueError(
            "losses and options are resolved already: pass them to resolve_losses(), or pass a "
            "name as method"
        )
    return method


def _loss_builder(resolved: ResolvedLosses, layers: LayerPairs) -> LossBuilder:
    """Builds the registered losses between a student and its teachers."""

    def build(student: Taps, teachers: Sequence[Frozen]) -> BuiltLosses:
        def layer_pairs(teacher: Frozen) -> list[tuple[TapKey, TapKey]]:
            return resolve_layer_pairs(student, teacher, layers)

        return build_losses(resolved, student, teachers, layer_pairs)

    return build


def _add_teacher_losses(
    method: Method,
    resolved: ResolvedLosses,
    strategy: StrategySpec,
    teachers: Sequence[Frozen],
    layers: LayerPairs,
) -> None:
    """Add the losses that stand beside a strategy; its first weights are those without them."""
    beside = resolved.beside_strategy()
    if not beside.weights:
        return
    if not isinstance(method, TakesTeacherLosses):
        raise ValueError(
            f"{strategy.title} takes no losses beside its own terms, "
            f"{', '.join(beside.weights)} given: leave them out, or give its method, a "
            f"{type(method).__name__}, the function add_teacher_losses(teachers, build)"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            method.add_teacher_losses(teachers, _loss_builder(beside, layers))
    except BaseException:
        method.release()
        raise


def _check_strategy_call(
    resolved: ResolvedLosses,
    strategy: StrategySpec,
    teachers: Sequence[Frozen],
    layers: LayerPairs,
) -> None:
    if layers != "auto" and not resolved.reads_features():
        raise ValueError(
            f"layers={layers!r} has no effect: this method pairs no features of a student and a "
            "teacher"
        )
    if strategy.needs_teacher and not teachers:
        raise ValueError(f"{strategy.title} needs a teacher, none was given")


def _check_loss_call(
    resolved: ResolvedLosses, teachers: Sequence[Frozen], layers: LayerPairs
) -> None:
    if layers != "auto" and not resolved.reads_features():
        raise ValueError(
            f"layers={layers!r} has no effect: the losses {', '.join(resolved.weights)} read no "
            "features. Leave it out, or add a loss that does, such as at, fitnet, sp or srkd"
        )
    own = [name for name, loss in resolved.loss_objects.items() if loss.needs_teacher]
    if own and not teachers:
        raise ValueError(f"the losses {', '.join(own)} need a teacher, none was given")


def _build_strategy(
    resolved: ResolvedLosses,
    strategy: StrategySpec,
    student: Taps,
    teachers: Sequence[Frozen],
    preprocess: Preprocess | None,
    image: tuple[int, int] | None,
    make_network: NetworkMaker | None,
) -> Method:
    student.check_training_forward()
    weights = {name: resolved.weights.get(name, 0.0) for name in strategy.losses}
    inputs = StrategyInputs(
        student,
        teachers,
        weights,
        image,
        preprocess or Preprocess.from_model(student.model, image),
        make_network or _copies_of(student.model),
    )
    return strategy.build(inputs, **resolved.strategy_options())


def _copies_of(network: nn.Module) -> NetworkMaker:
    """Builds further networks of the same architecture, re-initialised."""

    def make_network(k: int, spec: Any = None) -> nn.Module:
        if isinstance(spec, nn.Module):
            return spec
        if spec is not None:
            raise ValueError(
                f"network {k} is given as {spec!r}: pass an nn.Module, only distill() builds by "
                "name"
            )
        return reinitialised_copy(network, k)

    return make_network


def check_layers(layers: object) -> None:
    """Check that `layers` is "auto" or a list of pairs of taps, whatever the networks are.

    Args:
        layers: What was given.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(layers, str) and layers == "auto":
        return
    if not _is_list_of_pairs(layers):
        raise ValueError(
            f"layers={describe_value(layers)}: 'auto' or a list of (student tap, teacher tap): "
            "stage numbers or names"
        )


def resolve_layer_pairs(
    student: Taps, teacher: Taps, layers: LayerPairs
) -> list[tuple[TapKey, TapKey]]:
    """Pairs of taps between a student and a teacher, every tap checked.

    Args:
        student: The student.
        teacher: The teacher.
        layers: "auto", or pairs (student tap, teacher tap), stages or names of modules.

    Returns:
        Pairs (student tap, teacher tap); stage numbers are positive.

    Raises:
        ValueError: For a tap that does not exist, for what is no list of pairs, and with "auto"
            where no stages are found.
    """
    for side in (student, teacher):
        check_readable_features(side.model)
    if layers == "auto":
        found = pair_stages(student.stages, teacher.stages)
        if not found:
            side = teacher if student.stages else student
            raise ValueError(
                f"no stages were found in {type(side.model).__name__}: name the taps with "
                "layers=[(student tap, teacher tap), ...]"
            )
        return list(found)
    check_layers(layers)
    assert not isinstance(layers, str)
    for student_tap, teacher_tap in layers:
        student.boundary_of(student_tap)
        teacher.boundary_of(teacher_tap)
    return [(student.resolve_key(s), teacher.resolve_key(t)) for s, t in layers]


def _is_list_of_pairs(layers: object) -> bool:
    return isinstance(layers, (tuple, list)) and all(map(is_pair_of_taps, layers))
