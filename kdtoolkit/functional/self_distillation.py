"""A network that teaches itself: BYOT and BAKE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, ce, check_shapes, soft_ce
from kdtoolkit.functional.peers import PeerLogits, ce_each, stack_logits
from kdtoolkit.utils.validation import check_temperature


def byot_logits(student_logits: PeerLogits, *, temperature: float = 3.0) -> Tensor:
    """`soft_ce` of every classifier but the first to the first, detached, (K - 1,). Deepest first, no T^2."""
    z = stack_logits(student_logits)
    return torch.stack([soft_ce(s, z[0].detach(), temperature=temperature) for s in z[1:]])


def byot_features(student_features: Sequence[Tensor], *, exempt: int | None = 1) -> Tensor:
    """sum_i ||A_i f_i - f_0||_F, one unsquared norm over the whole batch, not divided by B; f_0 detached. Scalar.

    Features as in `byot`. exempt: the index left out, 1 in the authors' code, the deepest shallow one, although its
    comment says the shallowest (K - 1); None takes all. That entry is not looked at.
    """
    target = at_least_float32(student_features[0]).detach()
    total = target.new_zeros(())
    for i, feature in enumerate(student_features):
        if i not in (0, exempt):
            check_shapes(**{f"adapted_feature_{i}": feature, "deepest_feature": target})
            total = total + torch.linalg.vector_norm(at_least_float32(feature) - target)
    return total


def byot(
    student_logits: PeerLogits,
    student_features: Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 3.0,
    soft_weight: float = 0.3,
    feature_weight: float = 0.03,
    exempt: int | None = 1,
) -> Tensor:
    """CE_0 + sum_i [soft_weight * `byot_logits`_i + (1 - soft_weight) CE_i] + feature_weight * `byot_features`.

    Zhang et al. 2019, "Be Your Own Teacher", as in the authors' code of 2021; a scalar. K classifiers and features of
    one network, deepest first; features (B, ...) adapted to the shape of the first.
    """
    hard, soft = (
        ce_each(student_logits, labels),
        byot_logits(student_logits, temperature=temperature),
    )
    shallow = (soft_weight * soft + (1 - soft_weight) * hard[1:]).sum()
    return hard[0] + shallow + feature_weight * byot_features(student_features, exempt=exempt)


def byot_features_unofficial(student_features: Sequence[Tensor]) -> Tensor:
    """sum_i sum of (f_i - f_0)^2 where f_i or f_0 is above 0; a sum over the batch too, f_0 detached. Scalar."""
    target = at_least_float32(student_features[0]).detach()
    total = target.new_zeros(())
    for i, feature in enumerate(student_features[1:], start=1):
        check_shapes(**{f"feature_{i}": feature, "deepest_feature": target})
        active = (feature > 0) | (target > 0)
        total = total + ((at_least_float32(feature) - target).square() * active).sum()
    return total


def byot_unofficial(
    student_logits: PeerLogits,
    student_features: Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 3.0,
    alpha: float = 0.1,
    beta: float = 1e-6,
) -> Tensor:
    """(1 - alpha) sum CE_i + alpha T^2 sum_i `byot_logits`_i + beta * `byot_features_unofficial`. Scalar.

    The popular unofficial version of BYOT, nearer to the conference paper (T^2, squared distance). Deepest first.
    """
    soft = byot_logits(student_logits, temperature=temperature).sum() * temperature**2
    hard = ce_each(student_logits, labels).sum()
    return (1 - alpha) * hard + alpha * soft + beta * byot_features_unofficial(student_features)


@torch.no_grad()
def bake_targets(
    student_logits: Tensor,
    student_features: Tensor,
    *,
    temperature: float = 4.0,
    omega: float = 0.5,
) -> Tensor:
    """Q = (1 - omega) (I - omega A)^-1 softmax(z / T), (B, C); A = softmax over rows of f f^T without the diagonal.

    f: features (B, ...) flattened, unit length. omega: share that comes from the neighbours in the batch, 0 to 1
    (exclusive), 0.5 on CIFAR and ImageNet, 0.9 fine-grained. Rows sum to 1.
    """
    check_temperature(temperature)
    if not 0 <= omega < 1:
        raise ValueError(f"omega is the neighbours' share, 0 <= omega < 1, got {omega}")
    if len(student_logits) != len(student_features) or student_logits.ndim != 2:
        given = f"{tuple(student_logits.shape)} and {tuple(student_features.shape)}"
        raise ValueError(
            f"logits (B, C) and features (B, ...) of one batch are needed, got {given}"
        )
    p = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    with torch.autocast(p.device.type, enabled=False):
        f = F.normalize(at_least_float32(student_features).flatten(1), dim=1).to(p.dtype)
        self_loops = torch.eye(len(f), dtype=f.dtype, device=f.device)
        affinity = F.softmax(f @ f.T - 1e9 * self_loops, dim=1)
        return torch.linalg.solve(self_loops - omega * affinity, (1 - omega) * p).clamp(min=0)


def bake_kd(student_logits: Tensor, targets: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 sum_c Q (log Q - log softmax(z / T)), mean over the batch; logits and targets Q (B, C), Q detached."""
    check_temperature(temperature)
    check_shapes(student_logits=student_logits, targets=targets)
    log_s = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
    return F.kl_div(log_s, targets.detach(), reduction="none").sum(1).mean() * temperature**2


def bake(
    student_logits: Tensor,
    student_features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    omega: float = 0.5,
    weight: float = 1.0,
) -> Tensor:
    """CE + weight * `bake_kd` to `bake_targets` of the same batch. Scalar; no gradient reaches the features.

    Ge et al. 2021, "Self-distillation with Batch Knowledge Ensembling"; batches hold 3 more images of every class.
    """
    targets = bake_targets(student_logits, student_features, temperature=temperature, omega=omega)
    return ce(student_logits, labels) + weight * bake_kd(
        student_logits, targets, temperature=temperature
    )
