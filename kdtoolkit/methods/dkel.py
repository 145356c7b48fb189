"""Decoupled knowledge with ensemble learning, DKEL (Shao, Chen 2023).

Loss: CE(z_e) + sum over branches k of CE_k + w KD(z_k, z_e) + w [g KD(z_k, mean_{j != k} m_j) + (1
- g) mean_{j != k} KD(z_k, m_j)], T = 3, w = 0.1 exp(-5 (1 - e / 80)^2) in 300 epochs, g = exp(-e /
2), 0 from epoch 10; branches as in PCL, m_j of an exponential moving average (EMA, decay 0.999)
that starts with its own SGD steps at a hundredth of the learning rate.

Differs: this is the paper, and not the release, whose ramp-up divides by 0.1 (rampup="released": w
is 0 up to epoch 80), and whose EMA starts with alpha 0 (count="from 0"), which makes the
initialised teacher equal to the student after one step. The release's `--init k` makes k + 1 steps;
init_steps counts them. Where w is exactly 0 the EMA is not run and has the student's BatchNorm
statistics.
"""

from __future__ import annotations

from collections.abc import Mapping

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

RAMPED_TERMS = ("ensemble", "decaying")
RAMPUPS = ("intended", "released")
RELEASED_RAMPUP_EPOCHS = 80


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
    inputs: StrategyInputs,
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
    """Build decoupled knowledge with a decaying ensemble of averaged branches.

    Args:
        inputs: The student, weights, and what builds further networks.
        branches: Number of branches, the student among them, from 2.
        temperature: Of targets and predictions, no unit, above 0.
        cut: Stage number or module name behind which the branches part; "auto" is the last boundary
            in front of the last stage.
        rate: Rate of the exponential decay of the ensemble's share g, per epoch, from 0.
        decay: How g falls from 1 to 0: "exponential", "cosine" or "linear".
        init_steps: Steps of plain SGD that initialise the EMA, a whole number from 0.
        count: How the first updates of the EMA are weighted: "constant", "from 0" or "from 1"; see
            `EMATeacher`.
        ema_decay: Share of the average in each of its updates, from 0 to 1; None is 0.999, less in
            short runs.
        rampup: Rise of weights that are not given as numbers: "intended", as in the paper, or
            "released", as in the authors' code.
        rampup_epochs: Epochs over which the weights of "ensemble" and "decaying" rise, from 0; None
            is 80 in runs of 300 epochs and more, and the same share of shorter ones.

    Returns:
        The method; a branch of the average is exported.
    """
    check_choice("rampup", rampup, RAMPUPS)
    if rampup == "released":
        weights = _with_released_rampup(inputs.weights, rampup_epochs)
    else:
        weights = with_rampup(inputs.weights, RAMPED_TERMS, rampup_epochs)
    method = pcl_branches(inputs, weights, branches=branches, temperature=temperature, cut=cut)
    teacher = EMATeacher(0.0, decay=ema_decay, count=count, init_steps=init_steps, export="DKEL")
    decaying = DecayingEnsemble(
        weights["decaying"], rate=rate, decay=decay, temperature=temperature
    )
    method.callbacks = (teacher, decaying, Diversity())
    return method


def _with_released_rampup(
    given: Mapping[str, LossWeight], epochs: float | None
) -> dict[str, LossWeight]:
    """The weights with the ramp-up of the authors' code in place of the paper's."""
    weights = dict(given)
    until = RELEASED_RAMPUP_EPOCHS if epochs is None else epochs
    for term in RAMPED_TERMS:
        weight = weights[term]
        if isinstance(weight, SigmoidRampUp):
            weights[term] = RampUpAsCoded(weight.weight, until)
    return weights
