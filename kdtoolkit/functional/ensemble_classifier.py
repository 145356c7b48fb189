"""Peers on a shared trunk with an ensemble classifier and a mean teacher: PCL and DKEL.

Logits of K peers as in `peers`: (K, B, C, ...) or K tensors (B, C, ...); the teacher's in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtoolkit.functional.logits import ce, check_shapes, kd
from kdtoolkit.functional.peers import (
    PeerLogits,
    ce_each,
    mean_over_others,
    others_mean,
    stack_logits,
)
from kdtoolkit.utils.validation import check_temperature


def kd_ensemble(
    student_logits: PeerLogits, ensemble_logits: Tensor, *, temperature: float = 3.0
) -> Tensor:
    """`kd` of every peer to the ensemble classifier's logits (B, C, ...), detached, (K,)."""
    check_temperature(temperature)
    z = stack_logits(student_logits)
    check_shapes(peer_logits=z[0], ensemble_logits=ensemble_logits)
    return torch.stack([kd(s, ensemble_logits.detach(), temperature=temperature) for s in z])


def kd_other_teachers(
    student_logits: PeerLogits, teacher_logits: PeerLogits, *, temperature: float = 3.0
) -> Tensor:
    """For every peer i the mean over j != i of `kd`(z_i, m_j), m_j the teacher's peer j, detached, (K,)."""
    check_temperature(temperature)
    z, m = stack_logits(student_logits), stack_logits(teacher_logits).detach()
    check_shapes(student_logits=z, teacher_logits=m)
    return mean_over_others(lambda s, t: kd(s, t, temperature=temperature), z, m)


def kd_mean_of_other_teachers(
    student_logits: PeerLogits, teacher_logits: PeerLogits, *, temperature: float = 3.0
) -> Tensor:
    """For every peer i `kd`(z_i, mean over j != i of the logits m_j), detached, (K,): DKEL's ensemble knowledge."""
    check_temperature(temperature)
    z, targets = stack_logits(student_logits), others_mean(teacher_logits).detach()
    check_shapes(student_logits=z, teacher_logits=targets)
    return torch.stack([kd(s, t, temperature=temperature) for s, t in zip(z, targets, strict=True)])


def pcl_each(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    teacher_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
) -> Tensor:
    """Every peer's part of `pcl`, its cross-entropy included, (K,)."""
    ensemble = kd_ensemble(student_logits, ensemble_logits, temperature=temperature)
    mutual = kd_other_teachers(student_logits, teacher_logits, temperature=temperature)
    return ce_each(student_logits, labels) + weight * (ensemble + mutual)


def pcl(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    teacher_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
) -> Tensor:
    """CE(z_e) + sum_i [CE_i + w KD(z_i, z_e) + w mean_{j != i} KD(z_i, m_j)], targets detached. Scalar.

    Wu & Gong 2021, "Peer Collaborative Learning for Online Knowledge Distillation". z_e (B, C, ...) classifies the
    peers' concatenated features, m_j is peer j of the EMA teacher on its own view. weight: lambda (1) times
    exp(-5 (1 - e / 80)^2); the published reproduction has e / lambda, `schedules.rampup_as_coded`.
    """
    each = pcl_each(
        student_logits,
        ensemble_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        weight=weight,
    )
    return ce(ensemble_logits, labels) + each.sum()


def dkel_each(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    teacher_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 0.1,
    ensemble_weight: float = 1.0,
) -> Tensor:
    """Every peer's part of `dkel`, its cross-entropy included, (K,)."""
    ensemble = kd_ensemble(student_logits, ensemble_logits, temperature=temperature)
    early = kd_mean_of_other_teachers(student_logits, teacher_logits, temperature=temperature)
    late = kd_other_teachers(student_logits, teacher_logits, temperature=temperature)
    soft = ensemble + ensemble_weight * early + (1 - ensemble_weight) * late
    return ce_each(student_logits, labels) + weight * soft


def dkel(
    student_logits: PeerLogits,
    ensemble_logits: Tensor,
    teacher_logits: PeerLogits,
    labels: Tensor,
    *,
    temperature: float = 3.0,
    weight: float = 0.1,
    ensemble_weight: float = 1.0,
) -> Tensor:
    """CE(z_e) + sum_i {CE_i + w KD(z_i, z_e) + w [g KD(z_i, mean_{j != i} m_j) + (1 - g) mean_{j != i} KD(z_i, m_j)]}.

    Shao & Chen 2023, "Decoupled Knowledge with Ensemble Learning for Online Distillation"; a scalar, arguments as in
    `pcl`. weight: w, lambda (0.1) times the ramp-up over 80 epochs. ensemble_weight: g, 0 to 1, the decaying share of
    the teachers' ensemble, `schedules.exponential_decay` with rate 0.5 an epoch, 1 at the start.
    """
    options = {"temperature": temperature, "weight": weight, "ensemble_weight": ensemble_weight}
    each = dkel_each(student_logits, ensemble_logits, teacher_logits, labels, **options)
    return ce(ensemble_logits, labels) + each.sum()
