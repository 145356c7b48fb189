"""A network that teaches itself: BYOT and BAKE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, check_shapes, soft_ce
from kdtoolkit.functional.peers import PeerLogits, stack_logits
from kdtoolkit.utils.validation import check_number, check_temperature


def byot_logits(student_logits: PeerLogits, *, temperature: float = 3.0) -> Tensor:
    """Distance (`soft_ce`) of every classifier but the first to the first, detached; no T^2.

    Source: Zhang et al. 2019, "Be your own teacher", the authors' code of 2021.

    Args:
        student_logits: Logits of K classifiers of one network, deepest first: (K, B, C, ...), or K
            tensors (B, C, ...).
        temperature: T, no unit, above 0.

    Returns:
        (K - 1,).
    """
    deepest, *shallow = stack_logits(student_logits)
    losses = [soft_ce(s, deepest.detach(), temperature=temperature) for s in shallow]
    return torch.stack(losses)


def byot_features(student_features: Sequence[Tensor], *, exempt: int | None = 1) -> Tensor:
    """Distance of the adapted shallow features to the deepest one.

    sum_i ||A_i f_i - f_0||_F: one unsquared norm over the whole batch, not divided by B.

    Source: Zhang et al. 2019, "Be your own teacher", the authors' code of 2021. It exempts index 1,
    the deepest of the shallow features, although its comment says the shallowest (K - 1).

    Args:
        student_features: f_0, the deepest feature, detached here, and the shallower ones A_i f_i,
            adapted to its shape (B, ...), deepest first.
        exempt: Index of the feature that is left out and not looked at; None compares all.

    Returns:
        Scalar.

    Raises:
        ValueError: If shapes differ.
    """
    target = at_least_float32(student_features[0]).detach()
    total = target.new_zeros(())
    for i, feature in enumerate(student_features):
        if i not in (0, exempt):
            check_shapes(**{f"adapted_feature_{i}": feature, "deepest_feature": target})
            total = total + torch.linalg.vector_norm(at_least_float32(feature) - target)
    return total


@torch.no_grad()
def bake_targets(
    student_logits: Tensor,
    student_features: Tensor,
    *,
    temperature: float = 4.0,
    omega: float = 0.5,
) -> Tensor:
    """Predictions of a batch, mixed among similar samples.

    Q = (1 - omega) (I - omega A)^-1 softmax(z / T). A is the softmax over the rows of f f^T without
    the diagonal, where the rows of f are the flattened features with unit length.

    Source: Ge et al. 2021, "Self-distillation with batch knowledge ensembling" (BAKE).

    Args:
        student_logits: z, (B, C).
        student_features: f, (B, ...), of the same batch.
        temperature: T, no unit, above 0.
        omega: Share of the targets that comes from the other samples of the batch, from 0 to below
            1; 0.5 on CIFAR and ImageNet, 0.9 on fine-grained classes.

    Returns:
        Q, (B, C), without gradient; rows sum to 1.

    Raises:
        ValueError: If shapes do not fit together, or a number is out of its range.
    """
    check_temperature(temperature)
    check_number("omega", omega, minimum=0, below=1, meaning="share of the neighbours in a target")
    if len(student_logits) != len(student_features) or student_logits.ndim != 2:
        given = f"{tuple(student_logits.shape)} and {tuple(student_features.shape)}"
        raise ValueError(
            f"logits (B, C) and features (B, ...) of one batch are needed, got {given}"
        )
    p = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    with torch.autocast(p.device.type, enabled=False):
        f = F.normalize(at_least_float32(student_features).flatten(1), dim=1).to(p.dtype)
        identity = torch.eye(len(f), dtype=f.dtype, device=f.device)
        affinity = F.softmax(f @ f.T - 1e9 * identity, dim=1)
        targets: Tensor = torch.linalg.solve(identity - omega * affinity, (1 - omega) * p)
    return targets.clamp(min=0)


def bake_kd(student_logits: Tensor, targets: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL divergence of softened predictions to the targets of BAKE.

    T^2 sum_c Q (log Q - log softmax(z / T)), mean over the batch; Q is detached.

    Source: Ge et al. 2021, "Self-distillation with batch knowledge ensembling" (BAKE).

    Args:
        student_logits: z, (B, C).
        targets: Q, probabilities (B, C) of `bake_targets`.
        temperature: T, no unit, above 0.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, targets=targets)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    return F.kl_div(log_s, targets.detach(), reduction="none").sum(1).mean() * temperature**2
