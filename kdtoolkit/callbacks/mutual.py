"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384) between the networks of a run.

Loss     for every network k: mean over l != k of T^2 KL(p_l || p_k), p_l detached; T = 1; added to the networks' own
Differs  all networks step on one forward pass; in the paper each sees the others after their updates
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback, check_several_networks
from kdtoolkit.functional.peers import mean_over_others, others_mean, stack_logits
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils.validation import check_choice, check_temperature

TARGETS = ("pairwise", "ensemble")
FORMS: dict[str, Callable[..., Tensor]] = {
    "kl": functional.kd,
    "eps": functional.kd_eps,
    "soft-ce": functional.soft_ce,
}


class MutualKL(Callback):
    """Adds the loss "mutual": every network of the step learns from the others' probabilities.

    weight       number or schedule; 0 is off, exactly
    temperature  no unit, > 0
    target       "pairwise": each of the others in turn; "ensemble": the mean of their logits first
    detach       False lets gradients flow into the networks that teach, as OKDDip's benchmark does
    form         "kl": the paper's; "eps": 1e-7 added to the targets, with T^2, as in OKDDip's benchmark (T 3, not
                 detached); "soft-ce": cross-entropy without T^2, as in collaborative learning (T 2, "ensemble"); "tf":
                 the authors' TensorFlow release, a sum over the others (T 1, "pairwise", detached)
    """

    name = "mutual"
    order = 40

    def __init__(
        self,
        weight: LossWeight = 1.0,
        *,
        temperature: float = 1.0,
        target: str = "pairwise",
        detach: bool = True,
        form: str = "kl",
    ):
        check_choice("target", target, TARGETS)
        check_choice("form", form, (*FORMS, "tf"))
        if form == "tf" and (temperature, target, detach) != (1.0, "pairwise", True):
            raise ValueError(
                "form='tf' has temperature=1.0, target='pairwise' and detach=True: leave them out"
            )
        check_choice("detach", detach, (True, False))
        check_temperature(temperature)
        check_loss_weight(weight)
        self.weight, self.temperature, self.target, self.detach, self.form = (
            weight,
            temperature,
            target,
            detach,
            form,
        )

    def check(self, run: Any) -> None:
        check_several_networks(self, run.method)
        if run.method.networks_per_process and not self.detach:
            raise ValueError(
                "MutualKL(detach=False) sends gradients into the networks that teach, which other processes train: "
                "pass spread=False"
            )

    def plan_rows(self) -> list[dict[str, Any]]:
        whom = "the others' logits" if self.target == "pairwise" else "the others' mean logits"
        return [
            {
                "loss": "mutual",
                "weight": describe_weight(self.weight),
                "student": "every network",
                "teacher": whom,
            }
        ]

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        weight = weight_at(self.weight, run.clock)
        if weight == 0:
            return None
        students = stack_logits(list(step.logits.values()))
        if self.form == "tf":
            return {"mutual": weight * functional.mutual_kl_tf(students).sum()}
        teachers = students.detach() if self.detach else students
        loss = partial(FORMS[self.form], temperature=self.temperature)
        if self.target == "pairwise":
            return {"mutual": weight * mean_over_others(loss, students, teachers).sum()}
        each = [
            loss(own, others) for own, others in zip(students, others_mean(teachers), strict=True)
        ]
        return {"mutual": weight * torch.stack(each).sum()}
