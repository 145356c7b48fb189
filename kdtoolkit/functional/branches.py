"""Branches on a shared trunk: ONE and OKDDip.

Logits of K branches as in `peers`: (K, B, C, ...) or K tensors (B, C, ...). Weights that ramp up are those of
`schedules.sigmoid_rampup`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, ce, check_shapes, kd_eps
from kdtoolkit.functional.peers import PeerLogits, ce_each, stack_logits


def one_ensemble(student_logits: PeerLogits, gates: Tensor) -> Tensor:
    """sum_k g_k z_k, (B, C, ...): logits of K branches mixed by gates (B, K), a softmax over branches."""
    z = stack_logits(student_logits)
    if tuple(gates.shape) != (z.shape[1], len(z)):
        raise ValueError(
            f"one gate a sample and branch, shape ({z.shape[1]}, {len(z)}), got {tuple(gates.shape)}"
        )
    return (_trailing(at_least_float32(gates).T, z.ndim) * z).sum(0)


def one(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    eps: float = 1e-7,
) -> Tensor:
    """sum_k CE_k + CE(z_e) + weight * sum_k `kd_eps`(z_k, z_e detached). Scalar.

    Lan, Zhu, Gong 2018, "Knowledge Distillation by On-the-Fly Native Ensemble". z_e (B, C, ...) is `one_ensemble`: the
    gate learns from its cross-entropy alone. weight: exp(-5 (1 - e / 80)^2) of the 0-based epoch e.
    """
    soft = kd_ensemble_eps(student_logits, ensemble_logits, temperature=temperature, eps=eps)
    return ce_each(student_logits, labels).sum() + ce(ensemble_logits, labels) + weight * soft.sum()


def kd_ensemble_eps(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    *,
    temperature: float = 3.0,
    eps: float = 1e-7,
) -> Tensor:
    """`kd_eps` of every branch to the ensemble's logits (B, C, ...), detached, (K,)."""
    target = ensemble_logits.detach()
    return torch.stack(
        [kd_eps(z, target, temperature=temperature, eps=eps) for z in stack_logits(student_logits)]
    )


def okddip_attention(queries: PeerLogits, keys: PeerLogits) -> Tensor:
    """a_ij = softmax_j(q_i . k_j), (B, K, K): how much peer i listens to peer j, itself included; no scaling.

    Queries and keys (K, B, d): W_q h_i and W_k h_j of pooled embeddings h, d = D / 8, no bias. Chen et al. 2020.
    """
    q, k = stack_logits(queries), stack_logits(keys)
    check_shapes(queries=q, keys=k)
    return F.softmax((q.unsqueeze(1) * k.unsqueeze(0)).sum(-1), dim=1).permute(2, 0, 1)


def okddip_targets(peer_logits: PeerLogits, attention: Tensor) -> Tensor:
    """target_i = sum_j a_ij z_j, (K, B, C, ...). Mixed LOGITS, as in the code; the paper mixes softened predictions."""
    z = stack_logits(peer_logits)
    if tuple(attention.shape) != (z.shape[1], len(z), len(z)):
        wanted = (z.shape[1], len(z), len(z))
        raise ValueError(
            f"attention weighs every peer for every peer, shape {wanted}, got {tuple(attention.shape)}"
        )
    return (_trailing(at_least_float32(attention).permute(1, 2, 0), z.ndim + 1) * z).sum(1)


def okddip_peers(
    peer_logits: PeerLogits, attention: Tensor, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """`kd_eps` of every peer to its own target, (K,). Not detached: peers are pulled both ways, attention learns."""
    targets = okddip_targets(peer_logits, attention)
    pairs = zip(stack_logits(peer_logits), targets, strict=True)
    return torch.stack([kd_eps(s, t, temperature=temperature, eps=eps) for s, t in pairs])


def okddip_leader(
    student_logits: PeerLogits, *, temperature: float = 3.0, eps: float = 1e-7
) -> Tensor:
    """`kd_eps` of the leader, the last of `student_logits`, to the mean logits of the peers, not detached. Scalar."""
    z = stack_logits(student_logits)
    return kd_eps(z[-1], z[:-1].mean(0), temperature=temperature, eps=eps)


def okddip(
    student_logits: PeerLogits,
    attention: Tensor,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    eps: float = 1e-7,
) -> Tensor:
    """sum over peers and leader of CE + weight * (sum of `okddip_peers` + `okddip_leader`). Scalar.

    Chen, Mei, Wang, Feng, Chen 2020, "Online Knowledge Distillation with Diverse Peers". `student_logits` are K peers
    and, last, the leader; attention (B, K, K). weight: alpha = 1 times the ramp-up over 80 epochs.
    """
    z = stack_logits(student_logits, labels)
    soft = okddip_peers(z[:-1], attention, temperature=temperature, eps=eps).sum()
    return ce_each(z, labels).sum() + weight * (
        soft + okddip_leader(z, temperature=temperature, eps=eps)
    )


def _trailing(weights: Tensor, dimensions: int) -> Tensor:
    """Dimensions of length 1 appended, so that weights broadcast over classes and positions."""
    return weights.reshape(*weights.shape, *[1] * (dimensions - weights.ndim))
