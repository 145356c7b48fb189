"""Offline distillation: frozen teachers, one student, any sum of named losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from kdtoolkit.core.loss import DistillationLoss, zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import MethodSpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.loss_rows import loss_rows
from kdtoolkit.methods.terms import weights_at
from kdtoolkit.schedules import describe_weight
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step, TapKey

METHODS.add("none")(MethodSpec({"ce": 1.0}, "Plain training on labels, without a teacher"))


class OfflineDistillation(Method):
    """A student under named, weighted losses, each between the student and one frozen teacher.

    Args:
        student: The student.
        teachers: Frozen teachers, or none.
        losses: Losses by name; with several teachers one per teacher, named "kd/0", "kd/1", ...
        weights: Weight of every loss, a number or a schedule. A loss of weight 0 is not computed,
            nor is a teacher that no other loss reads.
        preprocess: Input normalisation of the student; default that of its `pretrained_cfg`.
        image: Height and width of the data in pixels, where the student's own size is fixed and
            differs.
        teacher_of: Number of the teacher that each loss reads; default the first.

    Raises:
        ValueError: If a loss has no weight.
    """

    def __init__(
        self,
        student: Taps,
        teachers: Sequence[Frozen],
        losses: Mapping[str, DistillationLoss],
        weights: Mapping[str, LossWeight],
        *,
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
        teacher_of: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        missing = [name for name in losses if name not in weights]
        if missing:
            raise ValueError(f"no weight for {', '.join(missing)}; weights given: {dict(weights)}")
        self.student = student.model
        self.losses = nn.ModuleDict(dict(losses))
        self.taps = student
        self.teachers = tuple(teachers)
        self.weights = dict(weights)
        self.teacher_of = dict(teacher_of or dict.fromkeys(losses, 0))
        self.preprocess = preprocess or Preprocess.from_model(student.model, image)
        self._select_taps()
        student.check_training_forward()

    def _select_taps(self) -> None:
        """Tap only what a loss reads: a feature that nothing reads is not kept in memory."""
        self.taps.select(
            _distinct(s for _, loss in self._named_losses() for s, _ in loss.read_taps)
        )
        for number, teacher in enumerate(self.teachers):
            losses = [
                loss for name, loss in self._named_losses() if self.teacher_of[name] == number
            ]
            teacher.select(_distinct(t for loss in losses for _, t in loss.read_taps))

    def _named_losses(self) -> list[tuple[str, DistillationLoss]]:
        return [(name, cast("DistillationLoss", loss)) for name, loss in self.losses.items()]

    def forward(self, batch: Batch, clock: Clock) -> Step:
        """One forward pass of the student, and of the teachers that are read.

        Every weighted loss is returned. One of weight 0 is a zero that depends on its parameters,
        because DistributedDataParallel expects a gradient for each.
        """
        weights = weights_at(self.weights, clock)
        student = self.taps(self.preprocess(batch["x"]))
        teachers: dict[int, Out] = {}
        losses: dict[str, Tensor] = {}
        for name, loss in self._named_losses():
            if weights[name] == 0.0:
                losses[name] = zero_loss(loss, student.logits)
                continue
            number = self.teacher_of[name]
            if loss.needs_teacher and number not in teachers:
                teachers[number] = self.teachers[number](batch["x"])
            teacher = teachers.get(number, student)
            losses[name] = weights[name] * loss(student, teacher, batch)
        return Step(losses, {"student": student.logits})

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return self.weights

    def networks(self) -> dict[str, nn.Module]:
        """The student."""
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of the student for images in [0, 1]."""
        return check_logits(self.student, self.student(self.preprocess(x)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile student and teachers."""
        for taps in (self.taps, *self.teachers):
            taps.compile()

    def release(self) -> None:
        """Remove all hooks, and give the teachers back as they were."""
        self.taps.remove_hooks()
        for teacher in reversed(self.teachers):
            teacher.release()

    def plan(self) -> MethodPlan:
        """One row for each loss, or for each pair of taps that it compares; parameters."""
        rows: list[PlanRow] = []
        for name, loss in self._named_losses():
            reads_teacher = loss.needs_teacher and self.teachers
            teacher = self.teachers[self.teacher_of[name]] if reads_teacher else None
            rows += loss_rows(name, loss, describe_weight(self.weights[name]), self.taps, teacher)
        counts = {"student": num_parameters(self.student)}
        for number, teacher in enumerate(self.teachers):
            name = "teacher" if len(self.teachers) == 1 else f"teacher/{number}"
            counts[name] = num_parameters(teacher.model)
        counts["adapters"] = num_parameters(self.losses)
        return {"losses": rows, "parameters": counts}


def _distinct(keys: Iterable[TapKey]) -> list[TapKey]:
    return list(dict.fromkeys(keys))
