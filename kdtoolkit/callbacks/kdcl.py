"""KDCL (Guo et al. 2020): all networks learn from one soft target.

"Online Knowledge Distillation via Collaborative Learning".

Loss: sum_i T^2 KL(softmax(z* / T) || softmax(z_i / T)), where z* is built of the logits of all
networks and the labels, detached.

Differs: no code was published; T = 2 and weight 1 are what later papers report. "general" mixes
logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback, check_same_images, check_several_networks
from kdtoolkit.core.plan import PlanRow
from kdtoolkit.core.run_context import RunContext, RunPreview
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils import distributed
from kdtoolkit.utils.validation import check_choice, check_temperature

RULES_WITH_LABELS = ("naive", "linear", "minlogit")


class KDCL(Callback):
    """Adds the loss "kdcl": every network learns from a target built of all.

    Args:
        weight: Number or schedule; 0 switches the loss off.
        rule: How the target is built: "minlogit", "naive", "linear", "mean", or "general": one
            weight for each network, found at the start of every epoch on the validation split, for
            the least squared error of the mixture.
        temperature: Above 0, no unit.

    Attributes:
        mixture: Weights (K,) of the rule "general"; None before the first epoch.

    Raises:
        ValueError: For an option that is not allowed.
    """

    name = "kdcl"
    order = 45

    def __init__(
        self, weight: LossWeight = 1.0, *, rule: str = "minlogit", temperature: float = 2.0
    ) -> None:
        check_choice("rule", rule, functional.KDCL_RULES)
        check_temperature(temperature)
        check_loss_weight(weight)
        self.weight, self.rule, self.temperature = weight, rule, temperature
        self.mixture: Tensor | None = None
        self._mixture_epoch = -1

    def check(self, run: RunPreview) -> None:
        """Refuse one network, other images for each, missing labels or validation split."""
        check_several_networks(self, run.method)
        if self.weight != 0:
            check_same_images(self, run.method)
        if run.data is None:
            return
        if self.rule in RULES_WITH_LABELS and run.data.num_unlabelled:
            raise ValueError(
                f"KDCL(rule={self.rule!r}) reads every label, and some rows have none: "
                "use rule='mean'"
            )
        if self.rule == "general" and run.data.val is None:
            raise ValueError(
                "KDCL(rule='general') weighs networks on held-out data, there is none: "
                "set validation=0.1"
            )

    def on_fit_start(self, run: RunContext) -> None:
        """Forget the mixture of an earlier run."""
        if run.clock.step == 0:
            self.mixture, self._mixture_epoch = None, -1

    def on_epoch_start(self, run: RunContext) -> None:
        """Find the mixture of "general", unless a resumed run has it for this epoch."""
        if self.rule == "general" and self._mixture_epoch != run.clock.epoch:
            self.mixture, self._mixture_epoch = self._find_mixture(run), run.clock.epoch

    @torch.no_grad()
    def _find_mixture(self, run: RunContext) -> Tensor:
        run.method.sync()
        distributed.broadcast_buffers(run.method)
        names, device = list(run.method.networks()), run.accelerator.device
        assert run.data.val is not None
        # a rank may get no batch
        logits = [torch.empty(0, len(names), run.data.num_classes, device=device)]
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
        run.method.eval()
        for batch in run.evaluation_batches(run.data.val):
            with run.accelerator.autocast():
                found = run.method.predict(batch["x"])
            logits.append(torch.stack([found[name].float() for name in names], 1))  # (B, K, C)
            labels.append(batch["y"])
        run.method.train()
        z, y = _gather_rows(torch.cat(logits)), _gather_rows(torch.cat(labels))
        return functional.kdcl_general_weights(z.transpose(0, 1), y)

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weight of its loss."""
        return {"kdcl": self.weight}

    def plan_rows(self) -> list[PlanRow]:
        """The loss "kdcl"."""
        teacher, weight = f"common target, {self.rule}", describe_weight(self.weight)
        return [PlanRow(loss="kdcl", weight=weight, student="every network", teacher=teacher)]

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The loss "kdcl"; see the module."""
        weight = weight_at(self.weight, run.clock, "kdcl")
        if weight == 0:
            return None
        z = [step.logits[name] for name in run.method.networks()]
        target = functional.kdcl_targets(z, batch["y"], rule=self.rule, weights=self.mixture)
        return {"kdcl": weight * functional.kdcl_kd(z, target, temperature=self.temperature).sum()}

    def state_dict(self) -> dict[str, Any]:
        """The mixture and its epoch."""
        return {"mixture": self.mixture, "found_in": self._mixture_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the mixture and its epoch."""
        self.mixture, self._mixture_epoch = state["mixture"], state["found_in"]


def _gather_rows(rows: Tensor) -> Tensor:
    """(N, ...) of each rank, with an N of its own -> the rows of all ranks."""
    counts = [int(n) for n in distributed.all_gather(torch.tensor(len(rows), device=rows.device))]
    missing = max(counts) - len(rows)
    padded = F.pad(
        rows, [0, 0] * (rows.ndim - 1) + [0, missing]
    )  # F.pad counts dimensions from the last
    gathered = distributed.all_gather(padded)
    return torch.cat([part[:n] for part, n in zip(gathered, counts, strict=True)])
