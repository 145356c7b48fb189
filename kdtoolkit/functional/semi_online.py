"""SOKD (Liu, Liu, Huang 2021): a trained branch of the frozen teacher between teacher and student."""

from __future__ import annotations

from torch import Tensor

from kdtoolkit.functional.logits import ce, check_shapes, kd
from kdtoolkit.utils.validation import check_temperature


def sokd_auxiliary(
    auxiliary_logits: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    teacher_weight: float = 1.0,
    student_weight: float = 1.0,
) -> Tensor:
    """The branch's loss: weighted CE(a), KD(a, teacher) and KD(a, student), targets detached. Logits (B, C, ...)."""
    soft = teacher_weight * _kd_to(auxiliary_logits, teacher_logits, temperature)
    soft = soft + student_weight * _kd_to(auxiliary_logits, student_logits, temperature)
    return ce_weight * ce(auxiliary_logits, labels) + soft


def sokd_student(
    student_logits: Tensor,
    auxiliary_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
) -> Tensor:
    """The student's loss: weighted CE(s) and KD(s, branch), the branch detached. Logits (B, C, ...)."""
    return ce_weight * ce(student_logits, labels) + kd_weight * _kd_to(
        student_logits, auxiliary_logits, temperature
    )


def sokd(
    student_logits: Tensor,
    auxiliary_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
) -> Tensor:
    """`sokd_auxiliary` + `sokd_student`, all five weights 1. Scalar.

    Liu, Liu, Huang 2021, "Semi-Online Knowledge Distillation": a trainable branch on the frozen teacher's last shared
    stage stands between teacher and student.
    """
    branch = sokd_auxiliary(
        auxiliary_logits, student_logits, teacher_logits, labels, temperature=temperature
    )
    return branch + sokd_student(student_logits, auxiliary_logits, labels, temperature=temperature)


def _kd_to(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, target_logits=target_logits)
    return kd(student_logits, target_logits.detach(), temperature=temperature)
