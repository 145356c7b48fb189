"""KDCL (Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning"): all learn from one soft target.

Loss     sum_i T^2 KL(softmax(z* / T) || softmax(z_i / T)), z* built of all networks' logits and the labels, detached
Differs  no code was published: T = 2 and weight 1 are what later papers report; "general" mixes logits
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback, check_several_networks
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils import distributed
from kdtoolkit.utils.validation import check_choice, check_temperature


class KDCL(Callback):
    """Adds the loss "kdcl": every network learns from the target of all.

    weight       number or schedule; 0 is off, exactly
    rule         "minlogit", "naive", "linear", "mean", or "general": one weight a network, found at the start of every
                 epoch on the validation split, for the least squared error of the mixture
    temperature  no unit, > 0
    """

    name = "kdcl"
    order = 45

    def __init__(
        self, weight: LossWeight = 1.0, *, rule: str = "minlogit", temperature: float = 2.0
    ):
        check_choice("rule", rule, functional.KDCL_RULES)
        check_temperature(temperature)
        check_loss_weight(weight)
        self.weight, self.rule, self.temperature = weight, rule, temperature
        self.mixture: Tensor | None = None  # (K,) of "general"
        self._found_in = -1  # epoch

    def check(self, run: Any) -> None:
        check_several_networks(self, run.method)
        if (
            self.rule in ("naive", "linear", "minlogit")
            and run.data is not None
            and run.data.unlabelled
        ):
            raise ValueError(
                f"KDCL(rule={self.rule!r}) reads every label, and some rows have none: use rule='mean'"
            )
        if self.rule == "general" and run.data is not None and run.data.val is None:
            raise ValueError(
                "KDCL(rule='general') weighs networks on held-out data, there is none: set validation=0.1"
            )

    def on_fit_start(self, run: Any) -> None:
        if run.clock.step == 0:
            self.mixture, self._found_in = None, -1

    def on_epoch_start(self, run: Any) -> None:
        if (
            self.rule == "general" and self._found_in != run.clock.epoch
        ):  # else a run that goes on within the epoch
            self.mixture, self._found_in = self._mix(run), run.clock.epoch

    @torch.no_grad()
    def _mix(self, run: Any) -> Tensor:
        run.method.sync()
        distributed.broadcast_buffers(run.method)
        names, device = list(run.method.networks()), run.accelerator.device
        logits = [
            torch.empty(0, len(names), run.data.num_classes, device=device)
        ]  # a rank may get no batch
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
        run.method.eval()
        for batch in run.evaluation_batches(run.data.val):
            with run.accelerator.autocast():
                found = run.method.predict(batch["x"])
            logits.append(torch.stack([found[name].float() for name in names], 1))  # (B, K, C)
            labels.append(batch["y"])
        run.method.train()
        z, y = _of_all_ranks(torch.cat(logits)), _of_all_ranks(torch.cat(labels))
        return functional.kdcl_general_weights(z.transpose(0, 1), y)

    def plan_rows(self) -> list[dict[str, Any]]:
        whom = f"common target, {self.rule}"
        return [
            {
                "loss": "kdcl",
                "weight": describe_weight(self.weight),
                "student": "every network",
                "teacher": whom,
            }
        ]

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        weight = weight_at(self.weight, run.clock)
        if weight == 0:
            return None
        z = [step.logits[name] for name in run.method.networks()]
        target = functional.kdcl_targets(z, batch["y"], rule=self.rule, weights=self.mixture)
        return {"kdcl": weight * functional.kdcl_kd(z, target, temperature=self.temperature).sum()}

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": self.mixture, "found_in": self._found_in}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture, self._found_in = state["mixture"], state["found_in"]


def _of_all_ranks(rows: Tensor) -> Tensor:
    """(N, ...) of each rank, of its own N -> all of them."""
    counts = [int(n) for n in distributed.all_gather(torch.tensor(len(rows), device=rows.device))]
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(counts) - len(rows)])
    return torch.cat(
        [part[:n] for part, n in zip(distributed.all_gather(padded), counts, strict=True)]
    )
