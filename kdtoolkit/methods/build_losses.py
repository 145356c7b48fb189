"""Builds the losses between a student and its teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.methods.resolve import ResolvedLosses
from kdtoolkit.schedules import weight_at
from kdtoolkit.types import LossWeight, TapKey


@dataclass(frozen=True)
class BuiltLosses:
    """Losses that are ready to train.

    Attributes:
        losses: Losses by name; with several teachers one per teacher, named "kd/0", "kd/1", ...
        weights: Their weights; each teacher gets an equal share.
        teacher_of: Number of the teacher that each reads.
    """

    losses: dict[str, DistillationLoss]
    weights: dict[str, LossWeight]
    teacher_of: dict[str, int]


def build_losses(
    resolved: ResolvedLosses,
    student: Taps,
    teachers: Sequence[Frozen],
    layer_pairs: Callable[[Frozen], list[tuple[TapKey, TapKey]]],
) -> BuiltLosses:
    """Build the losses between a student and its teachers.

    Args:
        resolved: Losses, weights and options.
        student: The student.
        teachers: Frozen teachers, or none.
        layer_pairs: Pairs of taps between the student and a teacher.

    Returns:
        A loss for each name that needs no teacher, and one for each teacher of the others.

    Raises:
        ValueError: If a loss needs a teacher and none was given, or refuses its options.
    """
    built = BuiltLosses({}, {}, {})
    for name in resolved.names_to_build():
        cls, options = LOSSES[name], resolved.options_of(name)
        weight = resolved.weights[name]
        if not cls.needs_teacher:
            built.losses[name] = cls(student, None, (), **options)
            built.weights[name], built.teacher_of[name] = weight, 0
            continue
        if not teachers:
            raise ValueError(
                f"the loss {name!r} needs a teacher, teacher=None was given: pass a teacher, or "
                "method='none'"
            )
        for number, teacher in enumerate(teachers):
            key = name if len(teachers) == 1 else f"{name}/{number}"
            pairs = layer_pairs(teacher) if cls.needs_taps else ()
            built.losses[key] = cls(student, teacher, pairs, **options)
            built.weights[key] = _share(weight, len(teachers))
            built.teacher_of[key] = number
    for name, loss in resolved.loss_objects.items():
        built.losses[name], built.weights[name] = loss, resolved.weights[name]
        built.teacher_of[name] = 0
    return built


def _share(weight: LossWeight, teachers: int) -> LossWeight:
    """The weight of each of several teachers."""
    if teachers == 1:
        return weight
    if not callable(weight):
        return weight / teachers
    schedule = weight
    return lambda clock: weight_at(schedule, clock) / teachers
