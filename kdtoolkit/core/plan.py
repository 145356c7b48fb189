"""Rows of the plan: what losses, methods and callbacks say of themselves before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from torch import nn

    from kdtoolkit.features.extractor import Taps
    from kdtoolkit.types import TapKey


class ComparedTaps(TypedDict, total=False):
    """A pair of taps that a loss compares, as `DistillationLoss.plan_rows` returns it.

    Attributes:
        student: Tap of the student.
        teacher: Tap of the teacher.
        adapter: Module between the student's feature and the comparison; None where there is none.
        entry: Modules in front of a stage of the teacher that runs on the student's feature.
    """

    student: TapKey
    teacher: TapKey
    adapter: nn.Module | None
    entry: nn.ModuleList


class PlanRow(TypedDict, total=False):
    """One row of the plan: a loss, what it reads, and what stands in between.

    Attributes:
        loss: Name of the term.
        weight: Its weight; the text of a schedule where it is one.
        student: What it reads of the student: a module's name, or "logits", "every network", ...
        student_shape: Shape of one feature without the batch dimension; only for taps.
        student_layout: Layout of that shape, such as "NCHW"; see `kdtoolkit.types.Shape`.
        teacher: What it is compared with: a module's name, or "logits", "labels", ...
        teacher_shape: As `student_shape`.
        teacher_layout: As `student_layout`.
        adapter: Class names of the modules in between.
        adapter_parameters: Number of their parameters.
    """

    loss: str
    weight: float | str
    student: str
    student_shape: list[int]
    student_layout: str
    teacher: str
    teacher_shape: list[int]
    teacher_layout: str
    adapter: str
    adapter_parameters: int


class MethodPlan(TypedDict, total=False):
    """What `Method.plan` returns.

    Attributes:
        losses: One row for each loss or, where it reads features, for each pair of taps.
        parameters: Number of parameters by part, such as "student", "teacher", "adapters".
        notes: Sentences on what the rows do not say.
    """

    losses: list[PlanRow]
    parameters: dict[str, int]
    notes: list[str]


def describe_tap(side: Literal["student", "teacher"], taps: Taps, key: TapKey) -> PlanRow:
    """The columns of a plan row for one tap: module name, shape, layout.

    Args:
        side: Whose columns they are.
        taps: The tapped network.
        key: Stage number or module name of the tap.
    """
    end = taps.boundary_of(key)
    sizes, layout = list(end.shape), end.shape.layout
    if side == "student":
        return {"student": end.name, "student_shape": sizes, "student_layout": layout}
    return {"teacher": end.name, "teacher_shape": sizes, "teacher_layout": layout}
