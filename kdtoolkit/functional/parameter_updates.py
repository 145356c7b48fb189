"""Update rules of parameters without a gradient: the EMA teacher and the parameter exchange of DCL.

Arithmetic is at least float32; results have the dtype of what they replace, so a bfloat16 teacher loses the small
steps of an EMA: keep it in float32. Parameters only, never integer counters or running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32

Params = TypeVar("Params", Tensor, Mapping[str, Tensor])
DCL_RULES = ("paper", "eps-free", "mean")


def ema_alpha(step: int, *, decay: float = 0.999) -> float:
    """min(1 - 1 / (step + 1), decay): the teacher's share in an EMA update that warms up, 0 to 1.

    Tarvainen & Valpola 2017 count `step` from 1 (first alpha 1/2); PCL and DKEL from 0 (first alpha 0: the teacher
    becomes the student). A constant share is `decay` itself.
    """
    if step < 0 or not 0 <= decay <= 1:
        raise ValueError(
            f"an EMA step is 0 or more and its decay between 0 and 1, got {step} and {decay}"
        )
    return min(1 - 1 / (step + 1), decay)


@torch.no_grad()
def ema_update(student_params: Params, teacher_params: Params, *, alpha: float = 0.999) -> Params:
    """alpha * teacher + (1 - alpha) * student, of two tensors or two dicts of tensors with the same keys.

    Tarvainen & Valpola 2017, "Mean Teachers Are Better Role Models". alpha: `ema_alpha(step)`, or constant.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the teacher's share, between 0 and 1, got {alpha}")
    pair = _same_parameters([student_params, teacher_params])
    merged = {k: _blend(teacher, student, alpha) for k, (student, teacher) in pair.items()}
    return cast(Params, merged if isinstance(teacher_params, Mapping) else merged[""])


def _blend(old: Tensor, new: Tensor, share: float) -> Tensor:
    return (share * at_least_float32(old) + (1 - share) * at_least_float32(new)).to(old.dtype)


@torch.no_grad()
def dcl_merge(
    student_params: Sequence[Params], *, beta: float = 0.1, rule: str = "paper", eps: float = 1e-18
) -> list[Params]:
    """w_i <- beta * w_avg + (1 - beta) * w_i for K networks, element by element; w_avg is `dcl_average`.

    Zhang et al. 2022, "Deep communication learning" (DCL). K tensors of one shape, or K dicts with the same keys;
    returns the same K, new. beta: share of the common weights, 0 to 1, 0.1 in the paper.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is the share of the common weights, between 0 and 1, got {beta}")
    merged: list[dict[str, Tensor]] = [{} for _ in student_params]
    for key, tensors in _same_parameters(student_params).items():
        average = dcl_average(tensors, rule=rule, eps=eps)
        for own, tensor in zip(merged, tensors, strict=True):
            own[key] = _blend(tensor, average, 1 - beta)
    tensors_given = isinstance(student_params[0], Tensor)
    return [cast(Params, own[""] if tensors_given else own) for own in merged]


@torch.no_grad()
def dcl_average(
    student_params: Sequence[Tensor], *, rule: str = "paper", eps: float = 1e-18
) -> Tensor:
    """w_avg = sum_i alpha_i w_i of K tensors of one shape; small weights count more.

    rule  "paper"     alpha_i = n_i / (sum n + eps), n_i the product of all other |w_j|
          "eps-free"  its limit alpha_i ~ 1 / |w_i|: for K of 5 and more eps is not small against the products, so that
                      sum alpha falls below 1 and "paper" shrinks small weights at every merge
          "mean"      alpha_i = 1 / K
    Computed as (m sum sign w_i) / (sum m / |w_i| + E), m = min |w|: no product of K numbers, no over- or underflow,
    opposite signs cancel exactly. Any exact zero gives 0.
    """
    check_rule(rule, eps)
    w = torch.stack([at_least_float32(p) for p in _same_parameters(student_params)[""]])
    if rule == "mean":
        return w.mean(0)
    ratios, extra = _dcl_ratios(w.abs(), eps if rule == "paper" else 0.0)
    return w.abs().amin(0) * w.sign().sum(0) / (ratios.sum(0) + extra)


@torch.no_grad()
def dcl_alphas(
    student_params: Sequence[Tensor], *, rule: str = "paper", eps: float = 1e-18
) -> Tensor:
    """The shares alpha_i of `dcl_average`, (K, ...). "eps-free": exact zeros hold equal parts of the whole share."""
    check_rule(rule, eps)
    w = torch.stack([at_least_float32(p) for p in _same_parameters(student_params)[""]]).abs()
    if rule == "mean":
        return torch.full_like(w, 1 / len(w))
    ratios, extra = _dcl_ratios(w, eps if rule == "paper" else 0.0)
    return ratios / (ratios.sum(0) + extra)


def _dcl_ratios(sizes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """m / |w_i| (0 / 0 is 1), (K, ...), and E = eps / (product of all |w_j| but the smallest), from |w| (K, ...)."""
    least = sizes.amin(0)
    ratios = torch.where(sizes > 0, least / sizes, torch.ones_like(sizes))
    if eps == 0:
        return ratios, torch.zeros_like(least)
    others = sizes.sort(0).values[1:].log().sum(0)
    return ratios, torch.exp(math.log(eps) - others)


def check_rule(rule: str, eps: float) -> None:
    """ValueError unless DCL knows the rule and eps is no less than 0."""
    if eps < 0:
        raise ValueError(f"eps of DCL is 0 or more, got {eps}")
    if rule not in DCL_RULES:
        raise ValueError(f"unknown rule {rule!r} of DCL; known: {', '.join(DCL_RULES)}")


def _same_parameters(
    networks: Sequence[Tensor] | Sequence[Mapping[str, Tensor]],
) -> dict[str, list[Tensor]]:
    """Key -> its tensors, one a network (plain tensors under ""); ValueError unless keys and shapes are the same."""
    given = [dict(n) if isinstance(n, Mapping) else {"": n} for n in networks]
    if len(given) < 2:
        raise ValueError(f"2 or more networks share parameters, got {len(given)}")
    for other in given[1:]:
        if other.keys() != given[0].keys():
            raise ValueError(
                f"networks differ in parameters: {sorted(other.keys() ^ given[0].keys())} are not in all"
            )
    series = {key: [n[key] for n in given] for key in given[0]}
    for key, tensors in series.items():
        what = f"parameter {key!r}" if key else "the parameter"
        if len({t.shape for t in tensors}) > 1:
            raise ValueError(
                f"{what} has one shape in all networks, got {[tuple(t.shape) for t in tensors]}"
            )
        if not all(t.is_floating_point() for t in tensors):
            raise ValueError(
                f"{what} is {tensors[0].dtype}: pass parameters, leave out buffers such as counters"
            )
    return series
