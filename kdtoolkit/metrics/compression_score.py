"""Task performance and compression in one number.

The survey of Si and Qi (2023, Journal of Image and Graphics 28(9), doi 10.11834/jig.220273) ends
with the wish for one measure that judges both task performance and compression. This is ours, with
top-1 accuracies in percent and `chance = 100 / classes`:

- retention `r = (top1_S - chance) / (top1_T - chance)`, at least 0: what the student keeps of what
  the teacher knows beyond guessing. Its key is `retention_above_chance`, because the `retention` of
  a run is `top1_S / top1_T`.
- compression `c` = geometric mean of `params_T / params_S`, `macs_T / macs_S` and, if measured,
  `latency_T / latency_S`.
- saved `s = max(0, 1 - 1 / c)`: the share of the cost that is saved.
- score = harmonic mean of r and s, `2 r s / (r + s)`; 0 if both are 0.

Range: 0 to 1 for a student no better than its teacher; r has no upper limit, so a better student
can score up to `2 r / (1 + r)`, a little above 1. The score grows with the student's accuracy and
with each ratio.

Limits: a student that equals the teacher in cost scores 0 however good it is, and so does a larger
one: nothing is compressed. A tiny student at chance scores 0: nothing is kept. Latency belongs to
one machine, whose load changes it little (see `kdtoolkit.metrics.model_cost.measure_costs`): scores
with it compare on that machine only, and scores with and without it do not compare. The teacher
must be above chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdtoolkit.metrics.classification import Top1
from kdtoolkit.metrics.model_cost import Cost, measure_costs
from kdtoolkit.utils.validation import check_whole_number


def score_compression(
    teacher_top1: float,
    student_top1: float,
    num_classes: int,
    teacher_cost: Cost,
    student_cost: Cost,
) -> dict[str, float | None]:
    """Compute the compression score and its parts, as defined at the top of this module.

    Args:
        teacher_top1: Accuracy of the teacher in percent, above chance.
        student_top1: Accuracy of the student in percent.
        num_classes: Number of classes, from 2.
        teacher_cost: Cost of the teacher.
        student_cost: Cost of the student.

    Returns:
        retention_above_chance, params_ratio, macs_ratio, latency_ratio (None if a latency is
        missing), compression, saved and compression_score; ratios and shares without a unit.

    Raises:
        ValueError: If the teacher is not above chance, or a cost is missing or not positive.

    Example:
        >>> score_compression(90.0, 70.0, 10, Cost(1000, 10_000), Cost(250, 2500))["saved"]
        0.75
    """
    check_whole_number("num_classes", num_classes, minimum=2, meaning="classes to choose among")
    chance = 100 / num_classes
    if not teacher_top1 > chance:
        raise ValueError(
            f"teacher_top1 {teacher_top1:.2f} % is not above chance, {chance:.2f} % with "
            f"{num_classes} classes: retention is undefined; check the teacher's weights, its "
            "normalisation and the order of its classes"
        )
    retention = max(0.0, (student_top1 - chance) / (teacher_top1 - chance))
    params_ratio = _ratio("params", teacher_cost.params, student_cost.params)
    macs_ratio = _ratio("macs", teacher_cost.macs, student_cost.macs)
    latency_ratio = None
    if teacher_cost.latency_ms is not None and student_cost.latency_ms is not None:
        latency_ratio = _ratio("latency_ms", teacher_cost.latency_ms, student_cost.latency_ms)
    known = [r for r in (params_ratio, macs_ratio, latency_ratio) if r is not None]
    factor = math.exp(sum(map(math.log, known)) / len(known))
    saved = max(0.0, 1 - 1 / factor)
    score = 2 * retention * saved / (retention + saved) if retention + saved else 0.0
    return {
        "retention_above_chance": retention,
        "params_ratio": params_ratio,
        "macs_ratio": macs_ratio,
        "latency_ratio": latency_ratio,
        "compression": factor,
        "saved": saved,
        "compression_score": score,
    }


def measure_compression(
    teacher: nn.Module,
    student: nn.Module,
    input_size: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    teacher_top1: float,
    student_top1: float,
    num_classes: int,
    device: str | torch.device = "cpu",
    latency: bool = True,
) -> dict[str, Any]:
    """Measure both networks; the keys are those of a run's final row, which the report reads.

    Args:
        teacher: The teacher.
        student: The student.
        input_size: (C, H, W) of one image in pixels, or `{"teacher": ..., "student": ...}`.
        teacher_top1: Accuracy of the teacher in percent.
        student_top1: Accuracy of the student in percent.
        num_classes: Number of classes.
        device: Where the latency is measured.
        latency: Whether to measure it.

    Returns:
        params, macs and latency_ms (milliseconds) of the student; teacher_params, teacher_macs and
        teacher_latency_ms; and compression, the dict of `score_compression`, which is left out
        where the teacher is not above chance.
    """
    networks = {"teacher": teacher, "student": student}
    costs = measure_costs(networks, input_size, device, latency=latency)
    row: dict[str, Any] = dict(costs["student"]._asdict())
    row |= {f"teacher_{name}": value for name, value in costs["teacher"]._asdict().items()}
    if teacher_top1 > 100 / num_classes:
        row["compression"] = score_compression(
            teacher_top1, student_top1, num_classes, costs["teacher"], costs["student"]
        )
    return row


class CompressionScore(Top1):
    """Compression score and its parts, see `score_compression`.

    Predictions are the student's logits (B, C), references class ids (B,).

    Args:
        teacher_top1: Accuracy of the teacher in percent.
        num_classes: Number of classes.
        teacher_cost: Cost of the teacher.
        student_cost: Cost of the student.
        sync: Add the counts of all ranks in `compute()`.

    Raises:
        ValueError: If the teacher is not above chance, or a cost is missing or not positive.
    """

    key = "compression_score"

    def __init__(
        self,
        teacher_top1: float,
        num_classes: int,
        teacher_cost: Cost,
        student_cost: Cost,
        sync: bool = True,
    ) -> None:
        # wrong numbers are an error here, not after the evaluation
        score_compression(teacher_top1, 0.0, num_classes, teacher_cost, student_cost)
        super().__init__(sync)
        self.teacher_top1, self.num_classes = teacher_top1, num_classes
        self.teacher_cost, self.student_cost = teacher_cost, student_cost

    def result(self, counts: list[float]) -> dict[str, Any]:
        """Return the score and its parts."""
        student_top1 = 100 * counts[1] / counts[0]
        return score_compression(
            self.teacher_top1, student_top1, self.num_classes, self.teacher_cost, self.student_cost
        )


def _ratio(name: str, teacher: float, student: float) -> float:
    if teacher is None or student is None:
        raise ValueError(
            f"{name} is missing (teacher {teacher}, student {student}); only latency_ms may be None"
        )
    if not (student > 0 and teacher > 0):
        raise ValueError(
            f"{name} must be positive, got teacher {teacher} and student {student}; "
            "measure them with measure_costs()"
        )
    return teacher / student
