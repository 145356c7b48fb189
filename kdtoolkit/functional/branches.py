"""Branches on a shared trunk: ONE and OKDDip.

The logits of K branches are given as in `kdtoolkit.functional.peers`. The weights of these terms
ramp up with `kdtoolkit.schedules.sigmoid_rampup`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, check_shapes, kd_eps
from kdtoolkit.functional.peers import PeerLogits, loss_to_each, stack_logits


def one_ensemble(student_logits: PeerLogits, gates: Tensor) -> Tensor:
    """Mix the logits of the branches by the shares of a gate: z_e = sum_k g_k z_k.

    Source: Lan, Zhu, Gong 2018, "Knowledge distillation by on-the-fly native ensemble" (ONE).

    Args:
        student_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        gates: g, (B, K), a softmax over the branches.

    Returns:
        Logits (B, C, ...).

    Raises:
        ValueError: If `gates` has another shape.
    """
    z = stack_logits(student_logits)
    if tuple(gates.shape) != (z.shape[1], len(z)):
        raise ValueError(
            f"one gate a sample and branch, shape ({z.shape[1]}, {len(z)}), "
            f"got {tuple(gates.shape)}"
        )
    return (_with_trailing_dimensions(at_least_float32(gates).T, z.ndim) * z).sum(0)


def kd_ensemble_eps(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    *,
    temperature: float = 3.0,
    eps: float = 1e-7,
) -> Tensor:
    """Distance (`kd_eps`) of every branch to the logits of the ensemble, which are detached.

    Source: Lan, Zhu, Gong 2018 (ONE), as published. The gate gets no gradient from this term.

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        ensemble_logits: (B, C, ...), of `one_ensemble`.
        temperature: T, no unit, above 0.
        eps: A probability.

    Returns:
        (K,).
    """
    target = ensemble_logits.detach()
    losses = [
        kd_eps(z, target, temperature=temperature, eps=eps) for z in stack_logits(student_logits)
    ]
    return torch.stack(losses)


def okddip_attention(queries: PeerLogits, keys: PeerLogits) -> Tensor:
    """How much peer i learns from peer j, itself included: a_ij = softmax_j(q_i . k_j).

    The products are not scaled. q_i = W_q h_i and k_j = W_k h_j of pooled embeddings h (B, D), with
    D / 8 rows and no bias.

    Source: Chen, Mei, Wang, Feng, Chen 2020, "Online knowledge distillation with diverse peers".

    Args:
        queries: q, (K, B, d), or K tensors (B, d).
        keys: k, of the same shape.

    Returns:
        a, (B, K, K); every row sums to 1.

    Raises:
        ValueError: If the shapes differ.
    """
    q, k = stack_logits(queries), stack_logits(keys)
    check_shapes(queries=q, keys=k)
    return F.softmax((q.unsqueeze(1) * k.unsqueeze(0)).sum(-1), dim=1).permute(2, 0, 1)


def okddip_targets(peer_logits: PeerLogits, attention: Tensor) -> Tensor:
    """Mix the logits of all peers by attention for every peer: target_i = sum_j a_ij z_j.

    Logits are mixed, as in the code; the paper mixes softened predictions.

    Source: Chen et al. 2020 (OKDDip).

    Args:
        peer_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        attention: a, (B, K, K), of `okddip_attention`.

    Returns:
        (K, B, C, ...).

    Raises:
        ValueError: If `attention` has another shape.
    """
    z = stack_logits(peer_logits)
    wanted = (z.shape[1], len(z), len(z))
    if tuple(attention.shape) != wanted:
        raise ValueError(
            f"attention weighs every peer for every peer, shape {wanted}, "
            f"got {tuple(attention.shape)}"
        )
    shares = at_least_float32(attention).permute(1, 2, 0)
    return (_with_trailing_dimensions(shares, z.ndim + 1) * z).sum(1)


def okddip_peers(
    peer_logits: PeerLogits, attention: Tensor, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """Distance (`kd_eps`) of every peer to its own target of `okddip_targets`.

    Targets are not detached: gradients reach the peers from both sides, and the attention learns.

    Source: Chen et al. 2020 (OKDDip).

    Args:
        peer_logits: (K, B, C, ...), or K tensors (B, C, ...).
        attention: (B, K, K), of `okddip_attention`.
        temperature: T, no unit, above 0.
        eps: A probability.

    Returns:
        (K,).
    """
    targets = okddip_targets(peer_logits, attention)
    loss = partial(kd_eps, temperature=temperature, eps=eps)
    return loss_to_each(loss, stack_logits(peer_logits), targets)


def okddip_leader(
    student_logits: PeerLogits, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """Distance (`kd_eps`) of the leader to the mean logits of the peers, which are not detached.

    Source: Chen et al. 2020 (OKDDip).

    Args:
        student_logits: Logits of the peers and, last, of the leader: (K + 1, B, C, ...), or K + 1
            tensors (B, C, ...).
        temperature: T, no unit, above 0.
        eps: A probability.

    Returns:
        Scalar.
    """
    z = stack_logits(student_logits)
    return kd_eps(z[-1], z[:-1].mean(0), temperature=temperature, eps=eps)


def _with_trailing_dimensions(weights: Tensor, dimensions: int) -> Tensor:
    """Dimensions of length 1 appended, so that weights broadcast over classes and positions."""
    return weights.reshape(*weights.shape, *[1] * (dimensions - weights.ndim))
