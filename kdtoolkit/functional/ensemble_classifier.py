"""Branches with an ensemble classifier and a mean teacher: PCL and DKEL.

The logits of K branches are given as in `kdtoolkit.functional.peers`, and so are those of the
teacher, which has as many branches in the same order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kdtoolkit.functional.logits import check_shapes, kd
from kdtoolkit.functional.peers import (
    PeerLogits,
    loss_to_each,
    mean_over_others,
    others_mean,
    stack_logits,
)
from kdtoolkit.utils.validation import check_temperature


def kd_ensemble(
    student_logits: PeerLogits, ensemble_logits: Tensor, *, temperature: float = 3.0
) -> Tensor:
    """Distance (`kd`) of every branch to the logits of the ensemble classifier, detached.

    Source: Wu & Gong 2021, "Peer collaborative learning for online knowledge distillation" (PCL).

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        ensemble_logits: (B, C, ...), of a classifier on the branches' concatenated features.
        temperature: T, no unit, above 0.

    Returns:
        (K,).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    z = stack_logits(student_logits)
    check_shapes(peer_logits=z[0], ensemble_logits=ensemble_logits)
    return torch.stack([kd(s, ensemble_logits.detach(), temperature=temperature) for s in z])


def kd_other_teachers(
    student_logits: PeerLogits, teacher_logits: PeerLogits, *, temperature: float = 3.0
) -> Tensor:
    """For every branch i the mean over j != i of `kd` to the logits m_j, detached.

    Source: Wu & Gong 2021 (PCL), and the late part of Shao & Chen 2023, "Decoupled knowledge with
    ensemble learning for online distillation" (DKEL).

    Args:
        student_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        teacher_logits: m, the logits of the teacher's branches, of the same shape.
        temperature: T, no unit, above 0.

    Returns:
        (K,).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    z, m = stack_logits(student_logits), stack_logits(teacher_logits).detach()
    check_shapes(student_logits=z, teacher_logits=m)
    return mean_over_others(partial(kd, temperature=temperature), z, m)


def kd_mean_of_other_teachers(
    student_logits: PeerLogits, teacher_logits: PeerLogits, *, temperature: float = 3.0
) -> Tensor:
    """For every branch i `kd` to the mean over j != i of the logits m_j, detached.

    Source: the ensemble knowledge of Shao & Chen 2023 (DKEL).

    Args:
        student_logits: z, (K, B, C, ...), or K tensors (B, C, ...).
        teacher_logits: m, the logits of the teacher's branches, of the same shape.
        temperature: T, no unit, above 0.

    Returns:
        (K,).

    Raises:
        ValueError: If shapes differ or the temperature is not above 0.
    """
    check_temperature(temperature)
    z, targets = stack_logits(student_logits), others_mean(teacher_logits).detach()
    check_shapes(student_logits=z, teacher_logits=targets)
    return loss_to_each(partial(kd, temperature=temperature), z, targets)
