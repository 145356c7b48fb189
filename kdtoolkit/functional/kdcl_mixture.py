"""The best mixture of logits for each sample, KDCL's rule "linear": an interior-point method."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.peers import PeerLogits, stack_logits

CONVERGED = 1e-16  # largest product of a weight and its multiplier
HALVINGS = 12  # most halvings of one Newton step


@torch.no_grad()
def kdcl_linear_weights(student_logits: PeerLogits, labels: Tensor, *, steps: int = 100) -> Tensor:
    """For each sample the weights a_i >= 0, sum 1, with the least cross-entropy of sum_i a_i z_i.

    The problem is convex; it is solved by a primal-dual interior-point method from equal weights,
    which needs about 30 steps to the last digits of float64. Equal networks make the weights, not
    their cross-entropy, ambiguous: one minimum is returned.

    Source: Guo et al. 2020, "Online knowledge distillation via collaborative learning" (KDCL).

    Args:
        student_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        labels: Class ids (B, ...), int64.
        steps: Most Newton steps.

    Returns:
        a, (K, B, ...), float64, without gradient.
    """
    z = stack_logits(student_logits, labels).double()
    differences = z - z.take_along_dim(labels[None, :, None], 2)  # 0 at the label
    gaps = differences.movedim(2, -1)  # (K, B, ..., C)
    shape = gaps.shape[:-1]
    gaps, own = gaps.flatten(1, -2).transpose(0, 1), F.one_hot(labels.flatten(), z.shape[2]).bool()
    a = torch.full(gaps.shape[:2], 1 / len(z), dtype=z.dtype, device=z.device)  # (N, K)
    slope, _ = _slope_and_curve(a, gaps, own)
    state = _State(a, torch.ones_like(a), 1 - slope.mean(1, keepdim=True))
    for _ in range(steps):
        state = _interior_step(state, gaps, own)
        if (state.weights * state.multipliers).max() < CONVERGED:
            break
    return state.weights.T.reshape(shape)


class _State(NamedTuple):
    """Point of the method, or a step of it.

    Attributes:
        weights: a, (N, K).
        multipliers: m of the conditions a >= 0, (N, K).
        sum_multiplier: n of the condition sum a = 1, (N, 1).
    """

    weights: Tensor
    multipliers: Tensor
    sum_multiplier: Tensor


def _slope_and_curve(a: Tensor, gaps: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (N, K) and Hessian (N, K, K) of the logsumexp of the wrong classes' mixed gaps.

    Gaps are (N, K, C). The logsumexp has the minima of the cross-entropy, its softplus, but not its
    vanishing slope where that is near 0. Both are divided by the spread of the gaps among networks;
    the gradient is that within sum a = 1.
    """
    relative = gaps - gaps.mean(1, keepdim=True)
    spread = relative.abs().amax((1, 2)).reshape(-1, 1, 1)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    mixed = (a.unsqueeze(1) @ gaps).squeeze(1)  # (N, C)
    q = mixed.masked_fill(own, -torch.inf).softmax(1).unsqueeze(1)  # (N, 1, C)
    mean = (relative * q).sum(2, keepdim=True)
    return (mean / spread).squeeze(2), ((relative - mean) * q) @ (relative - mean).mT / spread


def _interior_step(state: _State, gaps: Tensor, own: Tensor) -> _State:
    """A damped Newton step towards slope - m + n = 0 and m a = a tenth of the mean of m a now."""
    a, m, n = state
    slope, curve = _slope_and_curve(a, gaps, own)
    target, ones = 0.1 * (m * a).mean(1, keepdim=True), torch.ones_like(a).unsqueeze(2)
    top = torch.cat([curve + torch.diag_embed(m / a + 1e-15), ones], 2)
    bottom = torch.cat([ones.mT, torch.zeros_like(ones[:, :1])], 2)
    right = torch.cat([target / a - slope, torch.zeros_like(n)], 1)
    solved = torch.linalg.solve(torch.cat([top, bottom], 1), right)
    da, dn = solved[:, :-1], solved[:, -1:] - n
    step = _State(da, target / a - m - m / a * da, dn)
    return _damped(state, step, target, gaps, own)


def _damped(state: _State, step: _State, target: Tensor, gaps: Tensor, own: Tensor) -> _State:
    """The longest of 1, 1/2, ... of the step that keeps a, m > 0 and lessens every residual."""
    limits = [
        -x / dx.clamp(max=-1e-300)
        for x, dx in (
            (state.weights, step.weights),
            (state.multipliers, step.multipliers),
        )
    ]
    length = (0.99 * torch.cat(limits, 1).amin(1, keepdim=True)).clamp(max=1.0)
    start = _residual(state, target, gaps, own)
    for _ in range(HALVINGS):
        a, m, n = (x + length * dx for x, dx in zip(state, step, strict=True))
        worse = _residual(_State(a, m, n), target, gaps, own) > (1 - 0.01 * length) * start
        if not worse.any():
            break
        length = torch.where(worse, length / 2, length)
    return _State(a / a.sum(1, keepdim=True), m, n)


def _residual(state: _State, target: Tensor, gaps: Tensor, own: Tensor) -> Tensor:
    """Norm of what is left of the equations of `_interior_step`, (N, 1)."""
    a, m, n = state
    slope, _ = _slope_and_curve(a, gaps, own)
    left = torch.cat([slope - m + n, m * a - target], 1)
    norm: Tensor = torch.linalg.vector_norm(left, dim=1, keepdim=True)
    return norm
