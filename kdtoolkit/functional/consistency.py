"""The loss of Mean Teacher (Tarvainen, Valpola 2017) between a network and its moving average."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, check_shapes, kd


def consistency(student_logits: Tensor, teacher_logits: Tensor, *, kind: str = "mse") -> Tensor:
    """ "mse": mean over B and C of (softmax(s) - softmax(t))^2; "kl": KL(t || s), mean over B. Teacher detached.

    Tarvainen & Valpola 2017. Logits (B, C, ...), temperature 1. The symmetric distance of two heads is `logits_mse`.
    """
    if kind not in ("mse", "kl"):
        raise ValueError(f'unknown consistency {kind!r}; known: "mse", "kl"')
    if kind == "kl":
        return kd(student_logits, teacher_logits.detach(), temperature=1.0)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = (
        F.softmax(at_least_float32(z), dim=1) for z in (student_logits, teacher_logits.detach())
    )
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
    hard = (
        F.cross_entropy(
            at_least_float32(student_logits), labels, ignore_index=unlabelled, reduction="sum"
        )
        / labels.numel()
    )
    return hard + weight * consistency(student_logits, teacher_logits, kind=kind)
