"""The decaying ensemble of DKEL (Shao, Chen 2023, Decoupled Knowledge with Ensemble Learning for Online Distillation).

Loss     w sum_i [g KD(z_i, mean_{j != i} m_j) + (1 - g) mean_{j != i} KD(z_i, m_j)], m_j the logits of network j of the
         EMA teacher, detached; g = exp(-0.5 e) of the epoch e = 0, 1, ..., 0 once it is 0.01 or less
Differs  without an EMA teacher in the run, m_j are the other networks' own logits
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.callback import Callback, check_several_networks
from kdtoolkit.schedules import (
    check_loss_weight,
    cosine_rampdown,
    describe_weight,
    exponential_decay,
    linear_rampup,
    weight_at,
)
from kdtoolkit.types import Batch, Clock, LossWeight, Step
from kdtoolkit.utils.validation import check_choice, check_temperature

DECAYS = ("exponential", "cosine", "linear")


class DecayingEnsemble(Callback):
    """Adds the loss "decaying": first the teachers' ensemble teaches, later each of them.

    weight       w, number or schedule; 0 is off, exactly
    rate         of "exponential", per epoch
    decay        of the ensemble's share g: "exponential", "cosine" or "linear" from 1 to 0
    cut          "exponential": g is 0 once it is this or less
    length       epochs in which "cosine" and "linear" reach 0; default the whole run
    temperature  no unit, > 0

    The teacher is the first EMATeacher of the run. DKEL is EMATeacher(0.0, ...) beside DecayingEnsemble(w).
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
    ):
        check_choice("decay", decay, DECAYS)
        check_loss_weight(weight)
        if not rate >= 0 or not 0 <= cut < 1:
            raise ValueError(
                f"rate is {rate} and cut {cut}: a rate an epoch from 0, and a share from 0 to below 1"
            )
        if length is not None and (decay == "exponential" or not length > 0):
            raise ValueError(f"length is {length}: epochs above 0, of decay='cosine' or 'linear'")
        check_temperature(temperature)
        self.weight, self.rate, self.decay, self.cut = weight, rate, decay, cut
        self.length, self.temperature = length, temperature
        self.teacher: EMATeacher | None = None

    def check(self, run: Any) -> None:
        check_several_networks(self, run.method)

    def on_fit_start(self, run: Any) -> None:
        self.teacher = next((c for c in run.callbacks if isinstance(c, EMATeacher)), None)

    def share(self, clock: Clock) -> float:
        """g, the share of the ensemble in this epoch, 0 to 1."""
        if self.decay == "exponential":
            return exponential_decay(clock.epoch, self.rate, self.cut)
        length = clock.total_steps / clock.steps_per_epoch if self.length is None else self.length
        if self.decay == "cosine":
            return cosine_rampdown(clock.epoch, length)
        return 1.0 - linear_rampup(clock.epoch, length)

    def plan_rows(self) -> list[dict[str, Any]]:
        whom = "mean of the others, then each of them"
        return [
            {
                "loss": "decaying",
                "weight": describe_weight(self.weight),
                "student": "every network",
                "teacher": whom,
            }
        ]

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        weight = weight_at(self.weight, run.clock)
        if weight == 0:
            return None
        names = list(run.method.networks())
        teachers = step.logits if self.teacher is None else self.teacher.logits(run, batch)
        pair = [step.logits[name] for name in names], [teachers[name] for name in names]
        g, t, terms = self.share(run.clock), self.temperature, []
        if g > 0:
            terms.append(g * functional.kd_mean_of_other_teachers(*pair, temperature=t).sum())
        if g < 1:
            terms.append((1 - g) * functional.kd_other_teachers(*pair, temperature=t).sum())
        return {"decaying": weight * sum(terms[1:], terms[0])}
