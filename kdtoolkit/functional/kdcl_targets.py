"""Targets that several students build together: KDCL (Guo et al. 2020).

"Online Knowledge Distillation via Collaborative Learning"; no official code. Students' logits as in `peers`:
(K, B, C, ...) or K tensors (B, C, ...), of the same images, each under its own augmentation. Targets have no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import check_shapes, kd
from kdtoolkit.functional.peers import PeerLogits, ce_each, stack_logits
from kdtoolkit.utils.validation import check_temperature

KDCL_RULES = ("naive", "linear", "minlogit", "general", "mean")


def kdcl(
    student_logits: PeerLogits,
    target_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    weight: float = 1.0,
) -> Tensor:
    """sum_i CE_i + weight * sum_i T^2 KL(softmax(z* / T) || softmax(z_i / T)), z* (B, C, ...) detached. Scalar.

    z* is one of `kdcl_targets`. T = 2 and weight = 1 are what two later papers report of it.
    """
    soft = kdcl_kd(student_logits, target_logits, temperature=temperature)
    return ce_each(student_logits, labels).sum() + weight * soft.sum()


def kdcl_kd(
    student_logits: PeerLogits, target_logits: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """`kd` of every student to the common target (B, C, ...), detached, (K,)."""
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
    """Target logits (B, C, ...) from K students' logits.

    rule  "naive"     per sample the logits of the student with the least cross-entropy
          "linear"    per sample the mixture on the simplex with the least cross-entropy, `kdcl_linear_weights`
          "minlogit"  min_i (z_i,c - z_i,y): its cross-entropy is never above the best student's
          "general"   sum_i w_i z_i with `weights` (K,) of `kdcl_general_weights`, once an epoch from held-out data;
                      whether the paper mixes logits or probabilities is not settled
          "mean"      mean of the logits, what the one public reimplementation does
    """
    z = stack_logits(student_logits, labels)
    if rule == "naive":
        best = torch.stack([F.cross_entropy(s, labels, reduction="none") for s in z]).argmin(
            0, keepdim=True
        )
        return z.take_along_dim(best.unsqueeze(2), 0).squeeze(0)
    if rule == "linear":
        return (kdcl_linear_weights(z, labels).unsqueeze(2).to(z.dtype) * z).sum(0)
    if rule == "minlogit":
        return (z - z.take_along_dim(labels[None, :, None], 2)).amin(0)
    if rule == "general":
        return _mixed(z, weights)
    if rule == "mean":
        return z.mean(0)
    raise ValueError(f"unknown rule {rule!r} of KDCL; known: {', '.join(KDCL_RULES)}")


def _mixed(z: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None or tuple(weights.shape) != (len(z),):
        given = None if weights is None else tuple(weights.shape)
        raise ValueError(
            f'rule "general" needs one weight a student, shape ({len(z)},), got {given}'
        )
    return (weights.to(z).reshape(-1, *[1] * (z.ndim - 1)) * z).sum(0)


@torch.no_grad()
def kdcl_general_probabilities(
    student_logits: PeerLogits, weights: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """sum_i w_i softmax(z_i / T), (B, C, ...): the other reading of "general". Entries are negative where w is."""
    check_temperature(temperature)
    return _mixed(F.softmax(stack_logits(student_logits) / temperature, dim=2), weights)


@torch.no_grad()
def kdcl_covariance(val_logits: PeerLogits, val_labels: Tensor) -> Tensor:
    """C_ij = mean over held-out samples of <p_i - onehot(y), p_j - onehot(y)>, (K, K) float64, p at T = 1."""
    z = stack_logits(val_logits, val_labels).double()
    errors = F.softmax(z, dim=2).movedim(2, -1) - F.one_hot(val_labels, z.shape[2])
    errors = errors.flatten(1, -2)  # (K, N, C)
    return torch.einsum("inc,jnc->ij", errors, errors) / errors.shape[1]


@torch.no_grad()
def kdcl_general_weights(
    val_logits: PeerLogits, val_labels: Tensor, *, ridge: float = 0.0
) -> Tensor:
    """w = C^-1 1 / (1^T C^-1 1), (K,) float64: the mixture with the least squared error on held-out data; sums to 1,
    entries may be negative.

    ridge  added to the diagonal as a share of its mean. A singular C needs none: its pseudo-inverse gives identical
           students equal weights.
    """
    c = kdcl_covariance(val_logits, val_labels)
    c = c + ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    w = torch.linalg.pinv(c, hermitian=True).sum(1)
    return torch.where(w.sum() > 0, w / w.sum(), torch.full_like(w, 1 / len(w)))


@torch.no_grad()
def kdcl_linear_weights(student_logits: PeerLogits, labels: Tensor, *, steps: int = 100) -> Tensor:
    """Per sample the weights a_i >= 0, sum 1, with the least cross-entropy of sum_i a_i z_i, (K, B, ...) float64.

    Convex; a primal-dual interior-point method of at most `steps` Newton steps from equal weights (about 30 to the last
    digits of float64). Equal students make the weights, not their cross-entropy, ambiguous: one minimum is returned.
    """
    z = stack_logits(student_logits, labels).double()
    gaps = (z - z.take_along_dim(labels[None, :, None], 2)).movedim(
        2, -1
    )  # (K, B, ..., C), 0 at the label
    shape = gaps.shape[:-1]
    gaps, own = gaps.flatten(1, -2).transpose(0, 1), F.one_hot(labels.flatten(), z.shape[2]).bool()
    a = torch.full(gaps.shape[:2], 1 / len(z), dtype=z.dtype, device=z.device)  # (N, K)
    slope, _ = _slope_and_curve(a, gaps, own)
    state = (a, torch.ones_like(a), 1 - slope.mean(1, keepdim=True))
    for _ in range(steps):
        state = _interior_step(state, gaps, own)
        if (state[0] * state[1]).max() < 1e-16:
            break
    return state[0].T.reshape(shape)


State = tuple[
    Tensor, Tensor, Tensor
]  # weights (N, K), multipliers of a >= 0 (N, K), multiplier of sum a = 1 (N, 1)


def _slope_and_curve(a: Tensor, gaps: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (N, K) and Hessian (N, K, K) of logsumexp of the wrong classes' mixed gaps (N, K, C).

    It has the minima of the cross-entropy, its softplus, but not its vanishing slope where that is near 0. Both are
    divided by the spread of the gaps among students; the gradient is that within sum a = 1.
    """
    relative = gaps - gaps.mean(1, keepdim=True)
    spread = relative.abs().amax((1, 2)).reshape(-1, 1, 1)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    q = (
        (a.unsqueeze(1) @ gaps).squeeze(1).masked_fill(own, -torch.inf).softmax(1).unsqueeze(1)
    )  # (N, 1, C)
    mean = (relative * q).sum(2, keepdim=True)
    return (mean / spread).squeeze(2), ((relative - mean) * q) @ (relative - mean).mT / spread


def _interior_step(state: State, gaps: Tensor, own: Tensor) -> State:
    """A damped Newton step towards slope - m + n = 0, m a = target, the target a tenth of the mean of m a now."""
    a, m, n = state
    slope, curve = _slope_and_curve(a, gaps, own)
    target, ones = 0.1 * (m * a).mean(1, keepdim=True), torch.ones_like(a).unsqueeze(2)
    top = torch.cat([curve + torch.diag_embed(m / a + 1e-15), ones], 2)
    bottom = torch.cat([ones.mT, torch.zeros_like(ones[:, :1])], 2)
    right = torch.cat([target / a - slope, torch.zeros_like(n)], 1)
    solved = torch.linalg.solve(torch.cat([top, bottom], 1), right)
    da, dn = solved[:, :-1], solved[:, -1:] - n
    return _damped(state, (da, target / a - m - m / a * da, dn), target, gaps, own)


def _damped(state: State, way: State, target: Tensor, gaps: Tensor, own: Tensor) -> State:
    """The longest of 1, 1/2, ... of the step that keeps a and m above 0 and brings every sample nearer."""
    limits = [-x / dx.clamp(max=-1e-300) for x, dx in zip(state[:2], way[:2], strict=True)]
    length = (0.99 * torch.cat(limits, 1).amin(1, keepdim=True)).clamp(max=1.0)
    start = _distance(state, target, gaps, own)
    for _ in range(12):
        a, m, n = (x + length * dx for x, dx in zip(state, way, strict=True))
        worse = _distance((a, m, n), target, gaps, own) > (1 - 0.01 * length) * start
        if not worse.any():
            break
        length = torch.where(worse, length / 2, length)
    return a / a.sum(1, keepdim=True), m, n


def _distance(state: State, target: Tensor, gaps: Tensor, own: Tensor) -> Tensor:
    a, m, n = state
    slope, _ = _slope_and_curve(a, gaps, own)
    return torch.linalg.vector_norm(
        torch.cat([slope - m + n, m * a - target], 1), dim=1, keepdim=True
    )
