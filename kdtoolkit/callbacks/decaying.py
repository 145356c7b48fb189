"""The decaying ensemble of DKEL (Shao, Chen 2023).

"Decoupled Knowledge with Ensemble Learning for Online Distillation".

Loss: w sum_i [mean_{j != i} KD(z_i, m_j) + g KD(z_i, mean_{j != i} m_j)], where m_j are the logits
of network j of the EMA teacher, detached; g = exp(-0.5 e) of the epoch e = 0, 1, ..., and 0 once it
is 0.01 or less.

Differs: the authors' release has 1 - g in front of the first term (`combine="mix"`); section 3.4
and Table 3 of the paper add a loss. Without an EMA teacher in the run, m_j are the other networks'
own logits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.callback import Callback, check_same_images, check_several_networks
from kdtoolkit.core.plan import PlanRow
from kdtoolkit.core.run_context import RunContext, RunPreview
from kdtoolkit.schedules import (
    check_loss_weight,
    cosine_rampdown,
    describe_weight,
    exponential_decay,
    linear_rampup,
    weight_at,
)
from kdtoolkit.types import Batch, Clock, LossWeight, Step
from kdtoolkit.utils.validation import (
    check_choice,
    check_non_negative,
    check_number,
    check_positive,
    check_temperature,
    describe_value,
)

DECAYS = ("exponential", "cosine", "linear")
COMBINES = ("add", "mix")


class DecayingEnsemble(Callback):
    """Adds the loss "decaying": each of the teachers teaches, and at first their ensemble, too.

    The teacher is the first EMATeacher of the run. DKEL is `EMATeacher(0.0, ...)` beside
    `DecayingEnsemble(w)`.

    Args:
        weight: w, number or schedule; 0 switches the loss off.
        rate: Of the "exponential" decay, per epoch, from 0.
        decay: Course of the ensemble's share g: "exponential", "cosine" or "linear", from 1 to 0.
        cut: Of "exponential": g is 0 once it is this or less; from 0 to below 1.
        length: Epochs in which "cosine" and "linear" reach 0; None is the whole run.
        temperature: Of KD; above 0, no unit.
        combine: "add": the ensemble's part, times g, is added to that of each teacher; "mix": each
            teacher's is times 1 - g, as in the authors' release.

    Attributes:
        teacher: The EMATeacher of the run, or None.

    Raises:
        ValueError: For an option that is not allowed.
    """

    name = "decaying"
    order = 30

    def __init__(
        self,
        weight: LossWeight = 1.0,
        *,
        rate: float = 0.5,
        decay: str = "exponential",
        cut: float = 0.01,
        length: float | None = None,
        temperature: float = 3.0,
        combine: str = "add",
    ) -> None:
        check_choice("decay", decay, DECAYS)
        check_choice("combine", combine, COMBINES)
        check_loss_weight(weight)
        check_non_negative("rate", rate, "per epoch")
        check_number("cut", cut, minimum=0, below=1, meaning="a share")
        if length is not None:
            _check_length(length, decay)
        check_temperature(temperature)
        self.weight, self.rate, self.decay, self.cut = weight, rate, decay, cut
        self.length, self.temperature, self.combine = length, temperature, combine
        self.teacher: EMATeacher | None = None

    def check(self, run: RunPreview) -> None:
        """Refuse a single network, and other images for each."""
        check_several_networks(self, run.method)
        if self.weight != 0:
            check_same_images(self, run.method)

    def on_fit_start(self, run: RunContext) -> None:
        """Find the EMATeacher of the run."""
        self.teacher = next((c for c in run.callbacks if isinstance(c, EMATeacher)), None)

    def ensemble_share(self, clock: Clock) -> float:
        """g, the share of the ensemble in this epoch, 0 to 1.

        Args:
            clock: Step and epoch of the run, and how many there are.

        Returns:
            The share; constant within an epoch.
        """
        if self.decay == "exponential":
            return exponential_decay(clock.epoch, self.rate, self.cut)
        length = clock.total_steps / clock.steps_per_epoch if self.length is None else self.length
        if self.decay == "cosine":
            return cosine_rampdown(clock.epoch, length)
        return 1.0 - linear_rampup(clock.epoch, length)

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weight of its loss."""
        return {"decaying": self.weight}

    def plan_rows(self) -> list[PlanRow]:
        """The loss "decaying"."""
        early = "mean of the others" + (" and " if self.combine == "add" else ", then ")
        teacher = f"{early}each of them"
        weight = describe_weight(self.weight)
        return [PlanRow(loss="decaying", weight=weight, student="every network", teacher=teacher)]

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The loss "decaying"; see the module."""
        weight = weight_at(self.weight, run.clock, "decaying")
        if weight == 0:
            return None
        names = list(run.method.networks())
        found = step.logits if self.teacher is None else self.teacher.logits(run, batch)
        students, teachers = [step.logits[n] for n in names], [found[n] for n in names]
        g, t = self.ensemble_share(run.clock), self.temperature
        terms = []
        if g > 0:
            ensemble = functional.kd_mean_of_other_teachers(students, teachers, temperature=t)
            terms.append(g * ensemble.sum())
        share = 1.0 if self.combine == "add" else 1 - g
        if share > 0:
            each = functional.kd_other_teachers(students, teachers, temperature=t)
            terms.append(share * each.sum())
        return {"decaying": weight * sum(terms[1:], terms[0])}


def _check_length(length: object, decay: str) -> None:
    """Check the epochs in which a share falls to 0; an exponential decay has none."""
    try:
        check_positive("length", length)
        is_allowed = decay != "exponential"
    except ValueError:
        is_allowed = False
    if not is_allowed:
        raise ValueError(
            f"length is {describe_value(length)}; allowed: a number above 0 (epochs), with "
            "decay='cosine' or 'linear'"
        )
