"""Plan rows of a loss between a student and a teacher."""

from __future__ import annotations

from torch import nn

from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import num_parameters
from kdtoolkit.core.plan import ComparedTaps, PlanRow, describe_tap
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen


def loss_rows(
    name: str, loss: DistillationLoss, weight: float | str, student: Taps, teacher: Frozen | None
) -> list[PlanRow]:
    """The rows of one loss: one for each pair of taps that it compares, else one for the logits.

    Args:
        name: Name of the term.
        loss: The loss.
        weight: Its weight, a schedule as text.
        student: The student that it reads.
        teacher: The teacher that it reads; None for a loss on labels.

    Returns:
        The rows.
    """
    start = PlanRow(loss=name, weight=weight)
    compared = loss.plan_rows()
    if not compared:
        return [start | _logits_columns(teacher)]
    return [start | _feature_columns(row, student, teacher) for row in compared]


def _logits_columns(teacher: Frozen | None) -> PlanRow:
    return {"student": "logits", "teacher": "labels" if teacher is None else "logits"}


def _feature_columns(compared: ComparedTaps, student: Taps, teacher: Frozen | None) -> PlanRow:
    """Taps, shapes and adapters of one pair of features."""
    columns = describe_tap("student", student, compared["student"])
    if teacher is not None:
        columns |= describe_tap("teacher", teacher, compared["teacher"])
    adapter = compared.get("adapter")
    entry = list(
        compared.get("entry") or ()
    )  # in front of a reset stage, one for each input tensor
    names = [] if adapter is None else [_adapter_name(adapter)]
    if entry:
        times = f" x {len(entry)}" if len(entry) > 1 else ""
        names.append(f"entry {_adapter_name(entry[0])}{times}")
    if names:
        modules = entry if adapter is None else [adapter, *entry]
        columns["adapter"] = " + ".join(names)
        columns["adapter_parameters"] = sum(map(num_parameters, modules))
    return columns


def _adapter_name(adapter: nn.Module) -> str:
    return "identity" if getattr(adapter, "is_identity", False) else type(adapter).__name__
