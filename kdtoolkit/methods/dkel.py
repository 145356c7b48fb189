"""Decoupled knowledge with ensemble learning, DKEL (Shao, Chen 2023).

Loss: CE(z_e) + sum over branches k of CE_k + w KD(z_k, z_e) + w [mean_{j != k} KD(z_k, m_j) + g
KD(z_k, mean_{j != k} m_j)], T = 3, w = 0.1 exp(-5 (1 - e / 80)^2) in 300 epochs, g = exp(-e / 2), 0
from epoch 10; branches as in PCL, m_j of an exponential moving average (EMA, decay 0.999) that
starts with an SGD step of its own at learning rate 0.01.

Differs: this is the paper (protocol="paper"), and not the authors' release (protocol="released"),
whose ensemble is mixed with the single teachers, g and 1 - g (combine="mix"), whose ramp-up divides
by 0.1 (rampup="released": w is 0 up to epoch 80), whose first step has a hundredth of the learning
rate, and whose EMA starts with alpha 0 (count="from 0"), which makes the initialised teacher equal
to the student after one step. The release's `--init k` makes k + 1 steps; init_steps counts them.
Where w is exactly 0 the EMA is not run and has the student's BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
PARTS = ("both", "decoupled", "decaying", "none")
# protocol -> what options that are not given become; init_lr None is a hundredth of the run's
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {"combine": "add", "init_lr": 0.01, "count": "constant", "rampup": "intended"},
    "released": {"combine": "mix", "init_lr": None, "count": "from 0", "rampup": "released"},
}


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
    init_lr: float | None = None,
    count: str | None = None,
    ema_decay: float | None = None,
    combine: str | None = None,
    rampup: str | None = None,
    rampup_epochs: float | None = None,
    protocol: str = "paper",
    parts: str = "both",
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
        init_lr: Learning rate of these steps, above 0. Default: 0.01 (protocol "paper"), a
            hundredth of the run's ("released").
        count: How the first updates of the EMA are weighted: "constant", "from 0" or "from 1"; see
            `EMATeacher`. Default: "constant" ("paper"), "from 0" ("released").
        ema_decay: Share of the average in each of its updates, from 0 to 1; None is 0.999, less in
            short runs.
        combine: "add" or "mix", the ensemble's part and that of each teacher; see
            `DecayingEnsemble`. Default: "add" ("paper"), "mix" ("released").
        rampup: Rise of weights that are not given as numbers: "intended", as in the paper, or
            "released", as in the authors' code. Default: by the protocol.
        rampup_epochs: Epochs over which the weights of "ensemble" and "decaying" rise, from 0; None
            is 80 in runs of 300 epochs and more, and the same share of shorter ones.
        protocol: What the options that are not given become: "paper", or "released" as in the
            authors' code.
        parts: Rows of the paper's Table 3: "both", "decoupled" (the initialised teacher alone),
            "decaying" (the ensemble alone), or "none" (the baseline, PCL with these weights).

    Returns:
        The method; a branch of the average is exported.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("parts", parts, PARTS)
    given = {"combine": combine, "init_lr": init_lr, "count": count, "rampup": rampup}
    chosen = PROTOCOLS[protocol] | {k: v for k, v in given.items() if v is not None}
    check_choice("rampup", chosen["rampup"], RAMPUPS)
    if chosen["rampup"] == "released":
        weights = _with_released_rampup(inputs.weights, rampup_epochs)
    else:
        weights = with_rampup(inputs.weights, RAMPED_TERMS, rampup_epochs)
    method = pcl_branches(inputs, weights, branches=branches, temperature=temperature, cut=cut)
    decaying = DecayingEnsemble(
        weights["decaying"], rate=rate, decay=decay, temperature=temperature,
        combine=chosen["combine"],
    )  # fmt: skip
    has_ensemble = parts in ("both", "decaying")
    teacher = EMATeacher(
        0.0 if has_ensemble else weights["decaying"],
        decay=ema_decay,
        count=chosen["count"],
        temperature=temperature,
        init_steps=init_steps if parts in ("both", "decoupled") else 0,
        init_lr=chosen["init_lr"],
        export="DKEL",
        term="ema" if has_ensemble else "decaying",
    )
    method.callbacks = (teacher, *([decaying] if has_ensemble else []), Diversity())
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
