"""Deep mutual learning, DML, between the networks of a run.

Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384.

Loss: for every network k the mean over l != k of T^2 KL(p_l || p_k), with p_l detached and T = 1;
added to the networks' own losses.

Differs: all networks step on one forward pass; in the paper each sees the others after their
updates.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback, check_same_images, check_several_networks
from kdtoolkit.core.plan import PlanRow
from kdtoolkit.core.run_context import RunContext, RunPreview
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils.validation import check_choice, check_flag, check_temperature


class MutualKL(Callback):
    """Adds the loss "mutual": every network of the step learns from the others' probabilities.

    Args:
        weight: Number or schedule; 0 switches the loss off.
        temperature: Above 0, no unit.
        target: "pairwise": each of the others in turn; "ensemble": the mean of their logits.
        detach: False lets gradients flow into the networks that teach, as OKDDip's benchmark does.
        form: "kl": the paper's. "eps": 1e-7 added to the targets, with T^2, as in OKDDip's
            benchmark (T 3, not detached). "soft-ce": cross-entropy without T^2, as in
            collaborative learning (T 2, "ensemble"). "tf": the authors' TensorFlow release, a sum
            over the others (T 1, "pairwise", detached).

    Raises:
        ValueError: For an option that is not allowed.
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
    ) -> None:
        check_choice("target", target, functional.MUTUAL_TARGETS)
        check_temperature(temperature)
        check_choice("form", form, functional.MUTUAL_FORMS)
        if form == "tf" and (temperature, target, detach) != (1.0, "pairwise", True):
            raise ValueError(
                "form='tf' has temperature=1.0, target='pairwise' and detach=True: leave them out"
            )
        check_flag("detach", detach)
        check_loss_weight(weight)
        self.weight, self.temperature = weight, temperature
        self.target, self.detach, self.form = target, detach, form

    def check(self, run: RunPreview) -> None:
        """Refuse a single network, other images for each, and gradients into other processes."""
        check_several_networks(self, run.method)
        if self.weight != 0:
            check_same_images(self, run.method)
        if run.method.networks_per_process and not self.detach:
            raise ValueError(
                "MutualKL(detach=False) sends gradients into the networks that teach, which other "
                "processes train: pass spread=False"
            )

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weight of its loss."""
        return {"mutual": self.weight}

    def plan_rows(self) -> list[PlanRow]:
        """The loss "mutual"."""
        pairwise = self.target == "pairwise"
        teacher = "the others' logits" if pairwise else "the others' mean logits"
        weight = describe_weight(self.weight)
        return [PlanRow(loss="mutual", weight=weight, student="every network", teacher=teacher)]

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The loss "mutual"; see the module."""
        weight = weight_at(self.weight, run.clock, "mutual")
        if weight == 0:
            return None
        each = functional.mutual_loss(
            list(step.logits.values()),
            temperature=self.temperature,
            target=self.target,
            detach=self.detach,
            form=self.form,
        )
        return {"mutual": weight * each.sum()}
