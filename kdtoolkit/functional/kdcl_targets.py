"""Targets that several networks build together: KDCL.

Source: Guo et al. 2020, "Online knowledge distillation via collaborative learning"; the authors
published no code. The logits of K networks are given as in `kdtoolkit.functional.peers`; the
networks see the same images, each under its own augmentation. Targets have no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.kdcl_mixture import kdcl_linear_weights
from kdtoolkit.functional.logits import check_shapes, kd
from kdtoolkit.functional.peers import PeerLogits, stack_logits
from kdtoolkit.utils.validation import check_choice, check_temperature

KDCL_RULES = ("naive", "linear", "minlogit", "general", "mean")


def kdcl_kd(
    student_logits: PeerLogits, target_logits: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """Distance (`kd`) of every network to the common target, which is detached.

    T = 2, and a weight of 1 for the sum, are what two later papers report of KDCL.

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        target_logits: (B, C, ...), of `kdcl_targets`.
        temperature: T, no unit, above 0.

    Returns:
        (K,).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    z = stack_logits(student_logits)
    check_shapes(one_students_logits=z[0], target_logits=target_logits)
    return torch.stack([kd(s, target_logits.detach(), temperature=temperature) for s in z])


@torch.no_grad()
def kdcl_targets(
    student_logits: PeerLogits,
    labels: Tensor,
    *,
    rule: str = "minlogit",
    weights: Tensor | None = None,
) -> Tensor:
    """Build the common target from the logits of all networks.

    Args:
        student_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        labels: y, class ids (B, ...), int64.
        rule: How the target is built:

            - "naive": for each sample the logits of the network with the least cross-entropy.
            - "linear": for each sample the mixture on the simplex with the least cross-entropy, of
              `kdcl_linear_weights`.
            - "minlogit": min_i (z_i,c - z_i,y), never with a higher cross-entropy than the best.
            - "general": sum_i w_i z_i with `weights`. Whether the paper mixes logits or
              probabilities is not settled.
            - "mean": mean of the logits, as in the one public reimplementation.
        weights: w of the rule "general", (K,): `kdcl_general_weights`, once an epoch.

    Returns:
        Logits (B, C, ...), without gradient.

    Raises:
        ValueError: If `rule` is another one, `weights` do not fit, or shapes differ.
    """
    check_choice("rule", rule, KDCL_RULES)
    z = stack_logits(student_logits, labels)
    if rule == "naive":
        return _logits_of_best(z, labels)
    if rule == "linear":
        return (kdcl_linear_weights(z, labels).unsqueeze(2).to(z.dtype) * z).sum(0)
    if rule == "minlogit":
        return (z - z.take_along_dim(labels[None, :, None], 2)).amin(0)
    if rule == "general":
        return _mixed(z, weights)
    return z.mean(0)


def _logits_of_best(z: Tensor, labels: Tensor) -> Tensor:
    losses = torch.stack([F.cross_entropy(s, labels, reduction="none") for s in z])
    best = losses.argmin(0, keepdim=True)
    return z.take_along_dim(best.unsqueeze(2), 0).squeeze(0)


def _mixed(z: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None or tuple(weights.shape) != (len(z),):
        given = None if weights is None else tuple(weights.shape)
        raise ValueError(
            f'rule "general" needs one weight a student, shape ({len(z)},), got {given}'
        )
    return (weights.to(z).reshape(-1, *[1] * (z.ndim - 1)) * z).sum(0)


@torch.no_grad()
def kdcl_covariance(val_logits: PeerLogits, val_labels: Tensor) -> Tensor:
    """Covariance of the errors of the networks on held-out samples.

    C_ij = mean over samples of <p_i - onehot(y), p_j - onehot(y)>, p = softmax(z).

    Args:
        val_logits: z, (K, N, C, ...), or K tensors (N, C, ...), of held-out samples.
        val_labels: y, class ids (N, ...), int64.

    Returns:
        C, (K, K), float64.
    """
    z = stack_logits(val_logits, val_labels).double()
    errors = F.softmax(z, dim=2).movedim(2, -1) - F.one_hot(val_labels, z.shape[2])
    errors = errors.flatten(1, -2)  # (K, N, C)
    return torch.einsum("inc,jnc->ij", errors, errors) / errors.shape[1]


@torch.no_grad()
def kdcl_general_weights(
    val_logits: PeerLogits, val_labels: Tensor, *, ridge: float = 0.0
) -> Tensor:
    """Weights of the mixture with the least squared error on held-out data.

    w = C^-1 1 / (1^T C^-1 1), where C is `kdcl_covariance`.
    A singular C needs no ridge: its pseudo-inverse gives identical networks equal weights.

    Args:
        val_logits: (K, N, C, ...), or K tensors (N, C, ...), of held-out samples.
        val_labels: Class ids (N, ...), int64.
        ridge: Added to the diagonal of C, as a share of its mean.

    Returns:
        w, (K,), float64; sums to 1, entries may be negative.
    """
    c = kdcl_covariance(val_logits, val_labels)
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    w = torch.linalg.pinv(c, hermitian=True).sum(1)
    return torch.where(w.sum() > 0, w / w.sum(), torch.full_like(w, 1 / len(w)))
