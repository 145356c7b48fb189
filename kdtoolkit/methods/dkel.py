"""Decoupled knowledge with ensemble learning, DKEL (Shao, Chen 2023).

Loss     CE(z_e) + sum over branches of CE_k + w KD(z_k, z_e) + w [g KD(z_k, mean_{j != k} m_j) + (1 - g) mean_{j != k}
         KD(z_k, m_j)], T = 3, w = 0.1 exp(-5 (1 - e / 80)^2) in 300 epochs, g = exp(-e / 2), 0 from epoch 10; branches
         as in PCL, m_j of an EMA (0.999) that starts with SGD steps of its own at a hundredth of the learning rate
Differs  the paper, and not the release: whose ramp-up divides by 0.1 (rampup="released": w is 0 to epoch 80), and whose
         EMA starts with alpha 0 (count="from 0"), which makes the initialised teacher the student after one step. The
         release's `--init k` makes k + 1 steps; init_steps counts them. Where w is exactly 0 the EMA is not run and has
         the student's BatchNorm statistics
"""

from __future__ import annotations

from kdtoolkit.callbacks.decaying import DecayingEnsemble
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.pcl import pcl_branches
from kdtoolkit.schedules import RampUpAsCoded, SigmoidRampUp, with_rampup
from kdtoolkit.types import LossWeight, TapKey
from kdtoolkit.utils.validation import check_choice

RAMPED = ("ensemble", "decaying")
RAMPUPS = ("intended", "released")


@register_strategy(
    "dkel",
    losses={
        "ce": 1.0,
        "ce/ensemble": 1.0,
        "ensemble": SigmoidRampUp(0.1),
        "decaying": SigmoidRampUp(0.1),
    },
    title="Decoupled knowledge with ensemble learning, DKEL (Shao & Chen 2023)",
)
def dkel(
    given: StrategyInputs,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    rate: float = 0.5,
    decay: str = "exponential",
    init_steps: int = 1,
    count: str = "constant",
    ema_decay: float | None = None,
    rampup: str = "intended",
    rampup_epochs: float | None = None,
) -> Method:
    """branches: copies of what lies behind the cut; cut: a stage or a module's name; rate, decay: of the ensemble's
    share g, see DecayingEnsemble; init_steps, count, ema_decay: see EMATeacher; rampup: "intended" or "released", of
    weights that are not numbers; rampup_epochs: its length."""
    check_choice("rampup", rampup, RAMPUPS)
    weights: dict[str, LossWeight] = dict(given.weights)
    if rampup == "released":
        until = 80 if rampup_epochs is None else rampup_epochs
        for term in RAMPED:
            weight = weights[term]
            weights[term] = (
                RampUpAsCoded(weight.weight, until) if isinstance(weight, SigmoidRampUp) else weight
            )
    else:
        weights = with_rampup(weights, RAMPED, rampup_epochs)
    method = pcl_branches(given, weights, branches=branches, temperature=temperature, cut=cut)
    method.callbacks = (
        EMATeacher(0.0, decay=ema_decay, count=count, init_steps=init_steps, product="DKEL"),
        DecayingEnsemble(weights["decaying"], rate=rate, decay=decay, temperature=temperature),
        Diversity(),
    )
    return method
