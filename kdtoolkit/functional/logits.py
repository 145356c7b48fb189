"""Losses of one network's logits: against labels, against another's logits. Classes in dimension 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.utils.validation import check_temperature


def at_least_float32(x: Tensor) -> Tensor:
    """At least float32: bfloat16 and float16 are taken up, float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ce(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch. Logits (B, C, ...), labels (B, ...) int64."""
    return F.cross_entropy(
        at_least_float32(student_logits), labels, label_smoothing=label_smoothing
    )


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), summed over classes, mean over the batch. Logits (B, C, ...).

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_t = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean() * temperature**2


def logits_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of logits, (B, C, ...). Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?"."""
    return F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits))


def soft_ce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_c softmax(z_t / T) log softmax(z_s / T), mean over the batch, without T^2. Logits (B, C, ...).

    The soft term of collaborative learning (Song & Chai 2018) and of BYOT (Zhang et al. 2019): KL and the target's
    entropy. Nothing is detached.
    """
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    return -(F.softmax(at_least_float32(teacher_logits) / temperature, dim=1) * log_s).sum(1).mean()


def kd_eps(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """T^2 sum_c (q + eps) (log(q + eps) - log p), mean over the batch; p, q softmax at T. Logits (B, C, ...).

    `kd` as ONE (Lan, Zhu, Gong 2018) and OKDDip (Chen et al. 2020) publish it: `eps` (a probability) is added to every
    target, which then sums to 1 + C eps. Nothing is detached: gradients reach the target too.
    """
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    target = F.softmax(at_least_float32(teacher_logits) / temperature, dim=1) + eps
    return F.kl_div(log_s, target, reduction="none").sum(1).mean() * temperature**2


def check_shapes(**tensors: Tensor) -> None:
    """ValueError that names every tensor and its shape unless all have the same one."""
    if len({t.shape for t in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"these are compared element by element and need one shape, got {given}")
