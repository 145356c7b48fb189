"""Teachers that move with the student: SOKD's branch and the mean teacher. Logits (B, C, ...)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .logits import ce, check_shapes, check_temperature, full, kd


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
    return ce_weight * ce(student_logits, labels) + kd_weight * _kd_to(student_logits, auxiliary_logits, temperature)


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
    branch = sokd_auxiliary(auxiliary_logits, student_logits, teacher_logits, labels, temperature=temperature)
    return branch + sokd_student(student_logits, auxiliary_logits, labels, temperature=temperature)


def _kd_to(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, target_logits=target_logits)
    return kd(student_logits, target_logits.detach(), temperature=temperature)


def consistency(student_logits: Tensor, teacher_logits: Tensor, *, kind: str = "mse") -> Tensor:
    """ "mse": mean over B and C of (softmax(s) - softmax(t))^2; "kl": KL(t || s), mean over B. Teacher detached.

    Tarvainen & Valpola 2017. Logits (B, C, ...), temperature 1. The symmetric distance of two heads is `logits_mse`.
    """
    if kind not in ("mse", "kl"):
        raise ValueError(f'unknown consistency {kind!r}; known: "mse", "kl"')
    if kind == "kl":
        return _kd_to(student_logits, teacher_logits, 1.0)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = (F.softmax(full(z), dim=1) for z in (student_logits, teacher_logits.detach()))
    return F.mse_loss(student, teacher)


def mean_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight: float = 100.0,
    kind: str = "mse",
    unlabelled: int = -1,
) -> Tensor:
    """Sum of cross-entropies of labelled samples / B + weight * `consistency`. Scalar; logits (B, C, ...).

    Tarvainen & Valpola 2017, "Mean Teachers Are Better Role Models". The teacher is the EMA of the student on another
    augmentation. weight: 100 exp(-5 (1 - e / 5)^2) on CIFAR-10. unlabelled: the label of samples without one, which
    still count in B.
    """
    hard = F.cross_entropy(full(student_logits), labels, ignore_index=unlabelled, reduction="sum") / labels.numel()
    return hard + weight * consistency(student_logits, teacher_logits, kind=kind)
