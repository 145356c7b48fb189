"""Task and compression in one figure.

The survey of Si and Qi (2023, Journal of Image and Graphics 28(9), doi 10.11834/jig.220273) ends with the wish for one
measure that judges both task performance and compression. This is ours:

    retention    r = (top1_S - chance) / (top1_T - chance), chance = 100 / classes, at least 0: what the student keeps
                 of what the teacher knows beyond guessing; its key is retention_above_chance, for a run's `retention`
                 is top1_S / top1_T
    compression  c = geometric mean of params_T / params_S, macs_T / macs_S and, if measured, latency_T / latency_S
    saved        s = max(0, 1 - 1 / c): the share of the cost that is gone
    score        harmonic mean of r and s, 2 r s / (r + s); 0 if both are 0

Range    0 to 1 for a student no better than its teacher; r is not capped, so a better student can score up to
         2 r / (1 + r), a little above 1. It grows with the student's accuracy and with each ratio.
Limits   A student that equals the teacher in cost scores 0 however good it is, and so does a larger one: nothing is
         compressed. A tiny student at chance scores 0: nothing is kept. Latency belongs to one machine: scores with it
         compare on that machine only, and scores with and without it do not compare. The teacher must beat chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdtoolkit.metrics.classification import Top1
from kdtoolkit.metrics.cost import Cost, costs


def compression(
    teacher_top1: float,
    student_top1: float,
    num_classes: int,
    teacher_cost: Cost,
    student_cost: Cost,
) -> dict[str, float | None]:
    """The score and its parts, as the head of this file defines them. Accuracies in percent.

    Returns retention_above_chance, params_ratio, macs_ratio, latency_ratio (None if either latency is missing),
    compression, saved and compression_score.
    """
    if num_classes < 2:
        raise ValueError(
            f"num_classes {num_classes}: expected at least 2, or there is nothing to guess"
        )
    chance = 100 / num_classes
    if not teacher_top1 > chance:
        raise ValueError(
            f"teacher_top1 {teacher_top1:.2f} % is not above chance, {chance:.2f} % with {num_classes} classes: "
            "retention is undefined; check the teacher's weights, its normalisation and the order of its classes"
        )
    retention = max(0.0, (student_top1 - chance) / (teacher_top1 - chance))
    ratios = {field: _ratio(field, teacher_cost, student_cost) for field in Cost._fields}
    known = [math.log(ratio) for ratio in ratios.values() if ratio is not None]
    factor = math.exp(sum(known) / len(known))
    saved = max(0.0, 1 - 1 / factor)
    score = 2 * retention * saved / (retention + saved) if retention + saved else 0.0
    return {
        "retention_above_chance": retention,
        "params_ratio": ratios["params"],
        "macs_ratio": ratios["macs"],
        "latency_ratio": ratios["latency_ms"],
        "compression": factor,
        "saved": saved,
        "compression_score": score,
    }


def summary(
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
    """Measure both networks and return the keys that a run's final row carries and the report reads.

    input_size: (C, H, W) of one image, or {"teacher": (C, H, W), "student": (C, H, W)}
    params, macs, latency_ms (student), teacher_params, teacher_macs, teacher_latency_ms, and "compression", the dict of
    `compression`; the last is left out when the teacher is not above chance.
    """
    found = costs({"teacher": teacher, "student": student}, input_size, device, latency=latency)
    row: dict[str, Any] = dict(found["student"]._asdict())
    row |= {f"teacher_{key}": value for key, value in found["teacher"]._asdict().items()}
    if teacher_top1 > 100 / num_classes:
        row["compression"] = compression(
            teacher_top1, student_top1, num_classes, found["teacher"], found["student"]
        )
    return row


class CompressionScore(Top1):
    """Compression score and its parts, from the student's logits (B, C) and labels (B,); see `compression`."""

    key = "compression_score"

    def __init__(
        self,
        teacher_top1: float,
        num_classes: int,
        teacher_cost: Cost,
        student_cost: Cost,
        sync: bool = True,
    ):
        compression(
            teacher_top1, 0.0, num_classes, teacher_cost, student_cost
        )  # wrong numbers fail here
        super().__init__(sync)
        self.given = (num_classes, teacher_cost, student_cost)
        self.teacher_top1 = teacher_top1

    def result(self, counts: list[float]) -> dict[str, Any]:
        return compression(self.teacher_top1, 100 * counts[1] / counts[0], *self.given)


def _ratio(field: str, teacher: Cost, student: Cost) -> float | None:
    ours, theirs = getattr(student, field), getattr(teacher, field)
    if ours is None or theirs is None:
        if field != "latency_ms":
            raise ValueError(
                f"{field} is missing (teacher {theirs}, student {ours}); only latency_ms may be None"
            )
        return None
    if not (ours > 0 and theirs > 0):
        raise ValueError(
            f"{field} must be positive, got teacher {theirs} and student {ours}; measure them with costs()"
        )
    return theirs / ours
