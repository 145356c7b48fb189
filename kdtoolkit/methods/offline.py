"""Offline distillation: frozen teachers, one student, any sum of named objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdtoolkit.core.loss import DistillationLoss, zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import MethodSpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.resolve import ResolvedLosses
from kdtoolkit.schedules import describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step, TapKey

if "none" not in METHODS:
    METHODS.add("none")(MethodSpec({"ce": 1.0}, "Plain training on labels, without a teacher"))


class OfflineDistillation(Method):
    """A student under named, weighted objectives, each between the student and one frozen teacher (or none).

    objectives  {loss name: Objective}; with several teachers one per teacher, named "kd/0", "kd/1", ...
    weights     {loss name: number or schedule}
    """

    def __init__(
        self,
        student: Taps,
        teachers: Sequence[Frozen],
        objectives: Mapping[str, DistillationLoss],
        weights: Mapping[str, LossWeight],
        *,
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
        share_teacher: Mapping[str, int] | None = None,
    ):
        super().__init__()
        missing = [name for name in objectives if name not in weights]
        if missing:
            raise ValueError(f"no weight for {', '.join(missing)}; weights given: {dict(weights)}")
        self.student = student.model
        self.losses = nn.ModuleDict(dict(objectives))
        self.taps = student
        self.teachers = tuple(teachers)
        self.weights = dict(weights)
        self.teacher_of = dict(share_teacher or {name: 0 for name in objectives})
        self.preprocess = preprocess or Preprocess.of(student.model, image)
        self._select()
        student.rehearse()

    def _select(self) -> None:
        """Taps only where an objective reads: a feature that nobody reads is not kept alive."""
        parts = list(self._parts())
        self.taps.select(list(dict.fromkeys(s for _, o in parts for s, _ in o.pairs)))
        for number, teacher in enumerate(self.teachers):
            keys = [t for name, o in parts if self.teacher_of[name] == number for _, t in o.pairs]
            teacher.select(list(dict.fromkeys(keys)))

    def _parts(self) -> list[tuple[str, DistillationLoss]]:
        return list(self.losses.items())  # type: ignore[arg-type]

    def forward(self, batch: Batch, clock: Clock) -> Step:
        weights = {name: weight_at(self.weights[name], clock) for name in self.losses}
        student = self.taps(self.preprocess(batch["x"]))
        teachers: dict[int, Out] = {}
        losses: dict[str, Tensor] = {}
        for name, part in self._parts():
            if weights[name] == 0.0:  # switched off is off: no forward of the teacher either
                losses[name] = zero_loss(part, student.logits)
                continue
            number = self.teacher_of[name]
            if part.needs_teacher and number not in teachers:
                teachers[number] = self.teachers[number](batch["x"])
            teacher = teachers.get(number, student)
            losses[name] = weights[name] * part(student, teacher, batch)
        return Step(losses, {"student": student.logits})

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.student(self.preprocess(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for taps in (self.taps, *self.teachers):
            taps.compile()

    def release(self) -> None:
        self.taps.remove()
        for teacher in reversed(self.teachers):
            teacher.release()

    def plan(self) -> dict[str, Any]:
        rows = []
        for name, part in self._parts():
            teacher = (
                self.teachers[self.teacher_of[name]]
                if part.needs_teacher and self.teachers
                else None
            )
            for row in part.plan_rows() or [{}]:
                rows.append(_plan_row(name, self.weights[name], part, row, self.taps, teacher))
        counts = {"student": num_parameters(self.student)}
        for number, teacher in enumerate(self.teachers):
            counts["teacher" if len(self.teachers) == 1 else f"teacher/{number}"] = num_parameters(
                teacher.model
            )
        counts["adapters"] = num_parameters(self.losses)
        return {"losses": rows, "parameters": counts}


def _plan_row(
    name: str,
    weight: LossWeight,
    part: DistillationLoss,
    row: dict[str, Any],
    student: Taps,
    teacher: Frozen | None,
) -> dict[str, Any]:
    plan: dict[str, Any] = {"loss": name, "weight": describe_weight(weight)}
    if not row:
        return {
            **plan,
            "student": "logits",
            "teacher": "logits" if teacher is not None else "labels",
        }
    for side, taps in (("student", student), ("teacher", teacher)):
        if taps is not None:
            end = taps.end(row[side])
            plan |= {
                side: end.name,
                f"{side}_shape": list(end.shape),
                f"{side}_layout": end.shape.layout,
            }
    entry = list(
        row.get("entry") or ()
    )  # in front of a reset stage, one for each tensor that enters it
    between = ([] if row.get("adapter") is None else [row["adapter"]]) + entry
    if between:
        names = [_called(adapter) for adapter in between[: len(between) - len(entry)]]
        names += (
            [f"entry {_called(entry[0])}" + (f" x {len(entry)}" if len(entry) > 1 else "")]
            if entry
            else []
        )
        plan |= {
            "adapter": " + ".join(names),
            "adapter_parameters": sum(map(num_parameters, between)),
        }
    return plan


def _called(adapter: nn.Module) -> str:
    return "identity" if getattr(adapter, "is_identity", False) else type(adapter).__name__


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
                f"the loss {name!r} needs a teacher, teacher=None was given: pass a teacher, or method='none'"
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
    return lambda clock: schedule(clock) / teachers
