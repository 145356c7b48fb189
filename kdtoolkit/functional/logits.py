"""Losses on the logits of one network: against labels, or against the logits of another network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.utils.validation import check_temperature


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; other dtypes stay as they are.

    Args:
        x: Any tensor.

    Returns:
        `x` in float32 if it was bfloat16 or float16, else `x` itself.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def ce(student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, mean over the batch.

    Args:
        student_logits: Logits (B, C, ...).
        labels: Class ids (B, ...), int64.
        label_smoothing: Share of the target spread evenly over the classes, 0 to 1.

    Returns:
        Scalar.
    """
    return F.cross_entropy(
        at_least_float32(student_logits), labels, label_smoothing=label_smoothing
    )


def ce_partly_labelled(
    student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, unlabelled: int = -1
) -> Tensor:
    """Cross-entropy of a batch in which some samples have no label.

    The sum over the labelled samples divided by the number of all: a sample without a label adds
    nothing to the sum and counts in the batch size.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models", the authors' code.

    Args:
        student_logits: Logits (B, C, ...).
        labels: Class ids (B, ...), int64.
        label_smoothing: Share of the target spread evenly over the classes, 0 to 1.
        unlabelled: The label of samples without one.

    Returns:
        Scalar.
    """
    total = F.cross_entropy(
        at_least_float32(student_logits),
        labels,
        ignore_index=unlabelled,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / labels.numel()


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation: KL divergence of softened probabilities.

    T^2 KL(softmax(z_t / T) || softmax(z_s / T)), summed over classes, mean over the batch.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network".

    Args:
        student_logits: z_s, (B, C, ...).
        teacher_logits: z_t, (B, C, ...); not detached.
        temperature: T, no unit, above 0.

    Returns:
        Scalar.
    """
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    log_t = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean() * temperature**2


def logits_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits.

    Source: Ba & Caruana 2014, "Do deep nets really need to be deep?".

    Args:
        student_logits: Logits (B, C, ...).
        teacher_logits: Logits of the same shape; not detached.

    Returns:
        Scalar.
    """
    return F.mse_loss(at_least_float32(student_logits), at_least_float32(teacher_logits))


def soft_ce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy with softened probabilities.

    -sum_c softmax(z_t / T) log softmax(z_s / T), mean over the batch, without T^2.
    It is the KL divergence plus the entropy of the target.

    Source: the soft term of collaborative learning (Song & Chai 2018) and of BYOT (Zhang et al.
    2019).

    Args:
        student_logits: z_s, (B, C, ...).
        teacher_logits: z_t, (B, C, ...); not detached.
        temperature: T, no unit, above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    return -(F.softmax(at_least_float32(teacher_logits) / temperature, dim=1) * log_s).sum(1).mean()


def kd_eps(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """Knowledge distillation with `eps` added to the targets.

    T^2 sum_c (q + eps) (log(q + eps) - log p), mean over the batch; p and q are softmax(z / T).
    This is `kd` with `eps` added to every target probability, whose sum is then 1 + C eps.

    Source: the published code of ONE (Lan, Zhu, Gong 2018) and OKDDip (Chen et al. 2020).

    Args:
        student_logits: Logits (B, C, ...) of p.
        teacher_logits: Logits (B, C, ...) of q; not detached, gradients reach them too.
        temperature: T, no unit, above 0.
        eps: A probability.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    target = F.softmax(at_least_float32(teacher_logits) / temperature, dim=1) + eps
    return F.kl_div(log_s, target, reduction="none").sum(1).mean() * temperature**2


def check_shapes(**tensors: Tensor) -> None:
    """Check that tensors have one shape.

    Args:
        **tensors: The tensors under the names that the message should use.

    Raises:
        ValueError: If two shapes differ; the message names every tensor and its shape.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"these are compared element by element and need one shape, got {given}")
