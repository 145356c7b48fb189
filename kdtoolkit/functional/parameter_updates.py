"""Update rules of parameters without a gradient: the EMA teacher and the exchange of DCL.

Pass parameters only, never integer counters. Arithmetic is at least float32; results have the dtype
of what they replace, so a bfloat16 teacher loses the small steps of an EMA: keep it in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32
from kdtoolkit.utils.validation import check_choice, check_fraction, check_non_negative

Params = TypeVar("Params", Tensor, Mapping[str, Tensor])

DCL_RULES = ("paper", "eps-free", "mean")


def ema_alpha(step: int, *, decay: float = 0.999) -> float:
    """The teacher's share in an EMA update that warms up: min(1 - 1 / (step + 1), decay).

    A share without warm-up is `decay` itself.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models". They count steps from
    1 (the first share is 1/2); PCL and DKEL count from 0 (the first share is 0: the teacher becomes
    the student).

    Args:
        step: Number of the update, from 0.
        decay: Largest share, 0 to 1.

    Returns:
        The share, 0 to 1.

    Raises:
        ValueError: If a number is out of its range.
    """
    check_non_negative("step", step)
    check_fraction("decay", decay)
    return min(1 - 1 / (step + 1), decay)


@torch.no_grad()
def ema_update_(
    student_params: Sequence[Tensor], teacher_params: Sequence[Tensor], *, alpha: float = 0.999
) -> None:
    """Move the teacher towards the student, in place.

    teacher <- alpha * teacher + (1 - alpha) * student.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models".

    Args:
        student_params: Tensors of the student.
        teacher_params: As many tensors of the teacher, of the same shapes and dtypes.
        alpha: The teacher's share, 0 to 1: `ema_alpha(step)`, or constant.
    """
    torch._foreach_lerp_(list(teacher_params), list(student_params), 1 - alpha)


@torch.no_grad()
def ema_update(student_params: Params, teacher_params: Params, *, alpha: float = 0.999) -> Params:
    """Move the teacher towards the student, with new tensors; see `ema_update_`.

    Args:
        student_params: A tensor, or a dict of tensors.
        teacher_params: A tensor of the same shape, or a dict with the same keys and shapes.
        alpha: The teacher's share, 0 to 1.

    Returns:
        A tensor or a dict, in the dtypes of the teacher.

    Raises:
        ValueError: If `alpha` is out of its range, or keys or shapes differ.
    """
    check_fraction("alpha", alpha, "the teacher's share")
    pairs = _same_parameters([student_params, teacher_params])
    updated: dict[str, Tensor] = {}
    for key, (student, teacher) in pairs.items():
        new, dtype = at_least_float32(teacher).clone(), teacher.dtype
        ema_update_([student.to(new.dtype)], [new], alpha=alpha)
        updated[key] = new.to(dtype)
    result: Any = updated if isinstance(teacher_params, Mapping) else updated[""]
    return cast(Params, result)


@torch.no_grad()
def dcl_merge(
    student_params: Sequence[Params], *, beta: float = 0.1, rule: str = "paper", eps: float = 1e-18
) -> list[Params]:
    """Move the weights of K networks towards their common average.

    w_i <- beta * w_avg + (1 - beta) * w_i, where w_avg is `dcl_average`.

    Source: Zhang et al. 2022, "Deep communication learning" (DCL).

    Args:
        student_params: K tensors of one shape, or K dicts with the same keys and shapes; K from 2.
        beta: Share of the common weights, 0 to 1.
        rule: "paper", "eps-free" or "mean", see `dcl_average`.
        eps: Of the rule "paper", from 0.

    Returns:
        As many new tensors or dicts, in the dtypes that were given.

    Raises:
        ValueError: If an option is out of its range, or keys, shapes or dtypes do not fit.
    """
    check_fraction("beta", beta, "share of the common weights")
    merged: list[dict[str, Tensor]] = [{} for _ in student_params]
    for key, tensors in _same_parameters(student_params).items():
        average = dcl_average(tensors, rule=rule, eps=eps)
        for own, tensor in zip(merged, tensors, strict=True):
            own[key] = _blend(tensor, average, 1 - beta)
    tensors_given = isinstance(student_params[0], Tensor)
    return [cast(Params, own[""] if tensors_given else own) for own in merged]


def _blend(old: Tensor, new: Tensor, share: float) -> Tensor:
    return (share * at_least_float32(old) + (1 - share) * at_least_float32(new)).to(old.dtype)


@torch.no_grad()
def dcl_average(
    student_params: Sequence[Tensor], *, rule: str = "paper", eps: float = 1e-18
) -> Tensor:
    """Common average of K tensors, element by element, in which small weights count more.

    w_avg = sum_i alpha_i w_i.
    Computed as (m sum sign w_i) / (sum m / |w_i| + E) with m = min |w|: there is no product of K
    numbers, so nothing over- or underflows, and opposite signs cancel exactly. Any exact zero
    gives 0.

    Source: Zhang et al. 2022, "Deep communication learning" (DCL).

    Args:
        student_params: K tensors w_i of one shape, K from 2.
        rule: How the shares alpha_i are found:

            - "paper": alpha_i = n_i / (sum n + eps), n_i the product of all other |w_j|.
            - "eps-free": its limit, alpha_i ~ 1 / |w_i|. For K of 5 and more eps is not small
              against the products, so that sum alpha falls below 1 and "paper" shrinks small
              weights at every merge.
            - "mean": alpha_i = 1 / K.
        eps: Of the rule "paper", from 0.

    Returns:
        A tensor of that shape, at least float32.

    Raises:
        ValueError: If an option is out of its range, or shapes or dtypes do not fit.
    """
    _check_dcl_options(rule, eps)
    w = torch.stack([at_least_float32(p) for p in _same_parameters(student_params)[""]])
    if rule == "mean":
        return w.mean(0)
    ratios, extra = _dcl_ratios(w.abs(), eps if rule == "paper" else 0.0)
    return w.abs().amin(0) * w.sign().sum(0) / (ratios.sum(0) + extra)


@torch.no_grad()
def dcl_alphas(
    student_params: Sequence[Tensor], *, rule: str = "paper", eps: float = 1e-18
) -> Tensor:
    """The shares alpha_i of `dcl_average`, for inspection.

    Args:
        student_params: K tensors w_i of one shape, K from 2.
        rule: "paper", "eps-free" or "mean", see `dcl_average`. With "eps-free" exact zeros hold
            equal parts of the whole share.
        eps: Of the rule "paper", from 0.

    Returns:
        (K, ...), at least float32.

    Raises:
        ValueError: If an option is out of its range, or shapes or dtypes do not fit.
    """
    _check_dcl_options(rule, eps)
    w = torch.stack([at_least_float32(p) for p in _same_parameters(student_params)[""]]).abs()
    if rule == "mean":
        return torch.full_like(w, 1 / len(w))
    ratios, extra = _dcl_ratios(w, eps if rule == "paper" else 0.0)
    return ratios / (ratios.sum(0) + extra)


def _dcl_ratios(sizes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Ratios m / |w_i| (0 / 0 is 1), (K, ...), and E = eps / (product of all |w_j| but m)."""
    least = sizes.amin(0)
    ratios = torch.where(sizes > 0, least / sizes, torch.ones_like(sizes))
    if eps == 0:
        return ratios, torch.zeros_like(least)
    others = sizes.sort(0).values[1:].log().sum(0)
    return ratios, torch.exp(math.log(eps) - others)


def _check_dcl_options(rule: str, eps: float) -> None:
    check_choice("rule", rule, DCL_RULES)
    check_non_negative("eps", eps)


def _same_parameters(
    networks: Sequence[Tensor] | Sequence[Mapping[str, Tensor]],
) -> dict[str, list[Tensor]]:
    """The tensors of all networks by key (plain tensors under ""), checked to match."""
    given = [dict(n) if isinstance(n, Mapping) else {"": n} for n in networks]
    if len(given) < 2:
        raise ValueError(f"2 or more networks share parameters, got {len(given)}")
    for other in given[1:]:
        if other.keys() != given[0].keys():
            unmatched = sorted(other.keys() ^ given[0].keys())
            raise ValueError(f"networks differ in parameters: {unmatched} are not in all")
    by_key = {key: [n[key] for n in given] for key in given[0]}
    for key, tensors in by_key.items():
        _check_same_kind(f"parameter {key!r}" if key else "the parameter", tensors)
    return by_key


def _check_same_kind(name: str, tensors: list[Tensor]) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} has one shape in all networks, got {shapes}")
    if not all(t.is_floating_point() for t in tensors):
        raise ValueError(
            f"{name} is {tensors[0].dtype}: pass parameters, leave out buffers such as counters"
        )
