"""Several networks that learn from each other's logits: DML, CL and the variants of both.

The logits of K networks (or branches) on one batch are a stacked tensor (K, B, C, ...) or a
sequence of K tensors (B, C, ...), K from 2. A result (K,) holds one loss for each network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, kd, kd_eps, soft_ce
from kdtoolkit.utils.validation import check_choice, check_temperature

PeerLogits = Tensor | Sequence[Tensor]

MUTUAL_TARGETS = ("pairwise", "ensemble")
MUTUAL_FORMS = ("kl", "eps", "soft-ce", "tf")
_LOSS_OF_FORM: dict[str, Callable[..., Tensor]] = {"kl": kd, "eps": kd_eps, "soft-ce": soft_ce}


def stack_logits(student_logits: PeerLogits, labels: Tensor | None = None) -> Tensor:
    """Stack the logits of K networks, at least in float32.

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        labels: Class ids (B, ...), for a check of their shape.

    Returns:
        One tensor (K, B, C, ...).

    Raises:
        ValueError: If there are fewer than two networks, or shapes do not fit together.
    """
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
            f"labels are class ids of shape (B, ...), got {tuple(labels.shape)} for logits "
            f"{shapes[0]}"
        )
    return torch.stack(given)


def others_mean(student_logits: PeerLogits) -> Tensor:
    """For every network the mean logits of all the others.

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).

    Returns:
        (K, B, C, ...).
    """
    z = stack_logits(student_logits)
    return torch.stack([torch.cat([z[:k], z[k + 1 :]]).mean(0) for k in range(len(z))])


def mean_over_others(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor
) -> Tensor:
    """For every network k the mean over l != k of loss(students[k], teachers[l]).

    Args:
        loss: Function of two logits (B, C, ...) that returns a scalar.
        students: (K, B, C, ...).
        teachers: (K, B, C, ...), in the same order.

    Returns:
        (K,).
    """
    numbers = range(len(students))
    rows = [
        torch.stack([loss(students[k], teachers[m]) for m in numbers if m != k]).mean()
        for k in numbers
    ]
    return torch.stack(rows)


def loss_to_each(
    loss: Callable[[Tensor, Tensor], Tensor], students: Tensor, teachers: Tensor
) -> Tensor:
    """For every network k loss(students[k], teachers[k]).

    Args:
        loss: Function of two logits (B, C, ...) that returns a scalar.
        students: (K, B, C, ...).
        teachers: (K, B, C, ...), one target for each network.

    Returns:
        (K,).
    """
    return torch.stack([loss(s, t) for s, t in zip(students, teachers, strict=True)])


def mutual_loss(
    student_logits: PeerLogits,
    *,
    temperature: float = 1.0,
    target: str = "pairwise",
    detach: bool = True,
    form: str = "kl",
    eps: float | None = None,
) -> Tensor:
    """Distance of every network to the probabilities of the others.

    The defaults are deep mutual learning: the mean over l != k of T^2 KL(p_l || p_k), p_l detached.
    The paper has T = 1; for another T the factor T^2 keeps gradients at their size, as in `kd`.

    Source: Zhang, Xiang, Hospedales, Lu 2018, "Deep mutual learning". `form="tf"`: the authors'
    TensorFlow release, `mutual_kl_tf`. `form="eps"`, `detach=False`, T = 3: OKDDip's benchmark
    (Chen et al. 2020), whose DML has either target and whose CL-ILR has the target "ensemble".
    `form="soft-ce"`, `target="ensemble"`, T = 2: collaborative learning (Song & Chai 2018).

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        temperature: T, no unit, above 0.
        target: "pairwise": each of the others in turn, the mean of their losses; "ensemble": the
            mean of the others' logits.
        detach: Whether the networks that teach get no gradient.
        form: "kl" is `kd`, "eps" is `kd_eps`, "soft-ce" is `soft_ce`; "tf" is `mutual_kl_tf`, which
            has T = 1, the target "pairwise" and is detached.
        eps: A probability, of "eps" and "tf"; None is 1e-7 and 1e-8.

    Returns:
        (K,).

    Raises:
        ValueError: If an option is not one of those named here.
    """
    check_choice("form", form, MUTUAL_FORMS)
    check_choice("target", target, MUTUAL_TARGETS)
    check_temperature(temperature)
    students = stack_logits(student_logits)
    if form == "tf":
        return mutual_kl_tf(students, eps=1e-8 if eps is None else eps)
    loss = partial(_LOSS_OF_FORM[form], temperature=temperature)
    if form == "eps" and eps is not None:
        loss = partial(loss, eps=eps)
    teachers = students.detach() if detach else students
    if target == "pairwise":
        return mean_over_others(loss, students, teachers)
    return loss_to_each(loss, students, others_mean(teachers))


def mutual_kl_tf(student_logits: PeerLogits, *, eps: float = 1e-8) -> Tensor:
    """For every network k the sum over l != k of sum_c p_l log(eps + p_l / (p_k + eps)).

    The sum over the others has no mean; p_l is detached.

    Source: the authors' TensorFlow release of deep mutual learning (Zhang et al. 2018).

    Args:
        student_logits: (K, B, C, ...), or K tensors (B, C, ...).
        eps: A probability.

    Returns:
        (K,).
    """
    p = F.softmax(stack_logits(student_logits), dim=2)

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        return (t * torch.log(eps + t / (s + eps))).sum(1).mean()

    return mean_over_others(divergence, p, p.detach()) * (len(p) - 1)
