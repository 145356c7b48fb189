"""Networks of equal standing that learn from each other's logits: DML and collaborative learning (CL).

`student_logits` are those of K >= 2 networks (or branches) on one batch: a stacked tensor (K, B, C, ...) or a sequence
of K tensors (B, C, ...). A result (K,) holds one loss a network, a scalar is their sum with the cross-entropies, as
each paper has it. Labels (B, ...) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, ce, kd, kd_eps, soft_ce
from kdtoolkit.utils.validation import check_temperature

PeerLogits = Tensor | Sequence[Tensor]


def stack_logits(student_logits: PeerLogits, labels: Tensor | None = None) -> Tensor:
    """Logits of K networks as one tensor (K, B, C, ...), at least float32; ValueError on what cannot be peers."""
    given = [at_least_float32(z) for z in student_logits]
    shapes = [tuple(z.shape) for z in given]
    if len(given) < 2:
        raise ValueError(
            f"networks learn from each other: 2 or more are needed, got logits of {len(given)}"
        )
    if len(set(shapes)) > 1 or len(shapes[0]) < 2:
        raise ValueError(f"logits of every network have one shape (B, C, ...), got {shapes}")
    if labels is not None and tuple(labels.shape) != shapes[0][:1] + shapes[0][2:]:
        raise ValueError(
            f"labels are class ids of shape (B, ...), got {tuple(labels.shape)} for logits {shapes[0]}"
        )
    return torch.stack(given)


def others_mean(student_logits: PeerLogits) -> Tensor:
    """For every network the mean logits of all the others, (K, B, C, ...)."""
    z = stack_logits(student_logits)
    return torch.stack([torch.cat([z[:k], z[k + 1 :]]).mean(0) for k in range(len(z))])


def ce_each(student_logits: PeerLogits, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every network, (K,)."""
    return torch.stack(
        [
            ce(z, labels, label_smoothing=label_smoothing)
            for z in stack_logits(student_logits, labels)
        ]
    )


def mean_over_others(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor
) -> Tensor:
    """For every network k the mean over l != k of loss(students[k], teachers[l]), (K,). Both (K, B, C, ...)."""
    numbers = range(len(students))
    rows = [
        torch.stack([loss(students[k], teachers[m]) for m in numbers if m != k]).mean()
        for k in numbers
    ]
    return torch.stack(rows)


def mutual_kl(student_logits: PeerLogits, *, temperature: float = 1.0) -> Tensor:
    """For every network k the mean over l != k of T^2 KL(p_l || p_k), p_l detached, (K,).

    Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual Learning". The paper has T = 1 and no T^2; for another T the factor
    keeps gradients at their size, as in `kd`.
    """
    check_temperature(temperature)
    z = stack_logits(student_logits)
    return mean_over_others(lambda s, t: kd(s, t, temperature=temperature), z, z.detach())


def dml(
    student_logits: PeerLogits, labels: Tensor, *, temperature: float = 1.0, weight: float = 1.0
) -> Tensor:
    """Deep mutual learning: sum over networks of CE_k + weight * `mutual_kl`_k. Scalar.

    Zhang et al. 2018; all networks step on one forward pass, where the paper lets the second see the updated first.
    """
    return (
        ce_each(student_logits, labels)
        + weight * mutual_kl(student_logits, temperature=temperature)
    ).sum()


def mutual_kl_tf(student_logits: PeerLogits, *, eps: float = 1e-8) -> Tensor:
    """For every network k the sum over l != k of sum_c p_l log(eps + p_l / (p_k + eps)), p_l detached, (K,).

    The authors' TensorFlow release of DML: a sum over the peers, not their mean, and `eps` (a probability) twice.
    """
    p = F.softmax(stack_logits(student_logits), dim=2)

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return (t * torch.log(eps + t / (s + eps))).sum(1).mean()

    return mean_over_others(divergence, p, p.detach()) * (len(p) - 1)


def dml_tf(
    student_logits: PeerLogits, labels: Tensor, *, label_smoothing: float = 0.1, eps: float = 1e-8
) -> Tensor:
    """DML as in the authors' TensorFlow release (re-identification): smoothed CE_k + `mutual_kl_tf`_k, summed."""
    hard = ce_each(student_logits, labels, label_smoothing=label_smoothing)
    return (hard + mutual_kl_tf(student_logits, eps=eps)).sum()


def mutual_kl_eps(
    student_logits: PeerLogits, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """For every network k the mean over l != k of `kd_eps`(z_k, z_l), targets NOT detached, (K,)."""
    z = stack_logits(student_logits)
    return mean_over_others(lambda s, t: kd_eps(s, t, temperature=temperature, eps=eps), z, z)


def others_kl_eps(
    student_logits: PeerLogits, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """For every network k `kd_eps`(z_k, mean logits of the others), target NOT detached, (K,)."""
    pairs = zip(stack_logits(student_logits), others_mean(student_logits), strict=True)
    return torch.stack([kd_eps(s, t, temperature=temperature, eps=eps) for s, t in pairs])


def dml_okddip(
    student_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    eps: float = 1e-7,
    ensemble_first: bool = False,
) -> Tensor:
    """DML as OKDDip's benchmark (Chen et al. 2020) runs it: sum of CE_k + `mutual_kl_eps`_k, gradients in both sides.

    ensemble_first  the target is the mean of the others' logits (`others_kl_eps`), the default mode of that code
    """
    soft = others_kl_eps if ensemble_first else mutual_kl_eps
    return (
        ce_each(student_logits, labels) + soft(student_logits, temperature=temperature, eps=eps)
    ).sum()


def others_soft_ce(student_logits: PeerLogits, *, temperature: float = 2.0) -> Tensor:
    """For every head h the soft cross-entropy to softmax(mean of the others' logits / T), detached, no T^2, (K,)."""
    pairs = zip(stack_logits(student_logits), others_mean(student_logits).detach(), strict=True)
    return torch.stack([soft_ce(s, t, temperature=temperature) for s, t in pairs])


def cl_paper(
    student_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    beta: float = 0.5,
    squared: bool = False,
) -> Tensor:
    """Collaborative learning: sum over heads of beta CE_h + (1 - beta) `others_soft_ce`_h. Scalar.

    Song & Chai 2018, "Collaborative Learning for Deep Neural Networks". squared: T^2 before the soft term; whether the
    paper has it could not be confirmed. What heads share gets its gradient divided by `scale_gradient`.
    """
    factor = temperature**2 if squared else 1.0
    soft = others_soft_ce(student_logits, temperature=temperature)
    return (beta * ce_each(student_logits, labels) + (1 - beta) * factor * soft).sum()


def cl_okddip(
    student_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    eps: float = 1e-7,
) -> Tensor:
    """CL-ILR as OKDDip's benchmark runs it: sum of CE_h + weight * `others_kl_eps`_h, targets not detached. Scalar.

    weight  the ramp-up `schedules.sigmoid_rampup(epoch, 80)`
    """
    soft = others_kl_eps(student_logits, temperature=temperature, eps=eps)
    return (ce_each(student_logits, labels) + weight * soft).sum()


def scale_gradient(shared: Tensor, scale: float) -> Tensor:
    """The same values, exactly; the gradient that flows back is multiplied by `scale` (1 / number of children in CL).

    Song & Chai 2018, "intermediate-level representation sharing". Finite tensors of any shape.
    """
    return shared.detach() + scale * (shared - shared.detach())
