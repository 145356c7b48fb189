"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384) between the networks of a run.

Loss     for every network k: mean over l != k of T^2 KL(p_l || p_k), p_l detached; T = 1; added to the networks' own
Differs  all networks step on one forward pass; in the paper each sees the others after their updates
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional.peers import from_each_other, others_mean, peers
from ..schedules import value
from ..types import Batch, Step, Weight
from .base import Callback

TARGETS = ("pairwise", "ensemble")


class MutualKL(Callback):
    """Adds the loss "mutual": every network of the step learns from the others' probabilities.

    weight       number or schedule; 0 is off, exactly
    temperature  no unit, > 0
    target       "pairwise": each of the others in turn; "ensemble": the mean of their logits first
    detach       False lets gradients flow into the networks that teach, as OKDDip's benchmark does
    """

    name = "mutual"

    def __init__(
        self, weight: Weight = 1.0, *, temperature: float = 1.0, target: str = "pairwise", detach: bool = True
    ):
        if target not in TARGETS:
            raise ValueError(f"target is {target!r}; allowed: {', '.join(map(repr, TARGETS))}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, it must be positive")
        if not callable(weight) and not weight >= 0:
            raise ValueError(f"the weight is {weight}: a number >= 0, or a schedule (kdtoolkit.schedules)")
        self.weight, self.temperature, self.target, self.detach = weight, temperature, target, detach

    def on_fit_start(self, run: Any) -> None:
        count = len(run.method.networks())
        if count < 2:
            raise ValueError(f"MutualKL needs two networks or more, this run trains {count}: use Peers([...])")

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        weight = value(self.weight, run.clock)
        if weight == 0:
            return None
        students = peers(list(step.logits.values()))
        teachers = students.detach() if self.detach else students
        kd = partial(functional.kd, temperature=self.temperature)
        if self.target == "pairwise":
            return {"mutual": weight * from_each_other(kd, students, teachers).sum()}
        each = [kd(own, others) for own, others in zip(students, others_mean(teachers), strict=True)]
        return {"mutual": weight * torch.stack(each).sum()}
