"""The five terms of SOKD: a trained branch of the frozen teacher between teacher and student."""

from __future__ import annotations

from torch import Tensor

from kdtoolkit.functional.logits import ce, check_shapes, kd
from kdtoolkit.utils.validation import check_temperature


def sokd_terms(
    student_logits: Tensor,
    branch_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
) -> dict[str, Tensor]:
    """The unweighted terms of SOKD; the paper adds them up with weights of 1.

    In every KL divergence the other side is detached, so the terms of the student train the student
    alone, and those of the branch the branch alone.

    Source: Liu, Liu, Huang 2021, "Semi-online knowledge distillation".

    Args:
        student_logits: s, (B, C, ...).
        branch_logits: a, (B, C, ...), of a trained branch behind the frozen teacher's last shared
            stage.
        teacher_logits: t, (B, C, ...).
        labels: Class ids (B, ...), int64.
        temperature: T, no unit, above 0.

    Returns:
        Scalars: "ce" CE(s), "kd" KD(s, a), "ce/branch" CE(a), "kd/branch" KD(a, t) and
        "mutual/branch" KD(a, s).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    check_shapes(
        student_logits=student_logits, branch_logits=branch_logits, teacher_logits=teacher_logits
    )
    s, a, t = student_logits, branch_logits, teacher_logits
    return {
        "ce": ce(s, labels),
        "kd": kd(s, a.detach(), temperature=temperature),
        "ce/branch": ce(a, labels),
        "kd/branch": kd(a, t.detach(), temperature=temperature),
        "mutual/branch": kd(a, s.detach(), temperature=temperature),
    }
