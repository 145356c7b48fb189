"""Collaborative learning, CL (Song, Chai 2018, arXiv 1805.11761).

Loss     sum over heads of beta CE(z_h) + (1 - beta) CE(q_h, z_h / T), q_h = softmax(mean of the others' logits / T),
         detached; beta = 0.5 (the weights of "ce" and "cl"), T = 2. The gradient that enters what the heads share is
         divided by their number
Differs  one split in place of a tree of several; no T^2, which could not be confirmed
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branches import BranchJoin, build_branches
from kdtoolkit.types import TapKey
from kdtoolkit.utils.validation import check_temperature


class Others(nn.Module):
    """Every head learns from the mean logits of all others. It has no parameters. `temperature` has no unit, > 0."""

    terms = ("cl",)

    def __init__(self, *, temperature: float = 2.0):
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def ensemble(self, team: BranchJoin) -> Tensor:
        return torch.stack(team.logits).mean(0)

    def forward(self, team: BranchJoin, labels: Tensor) -> dict[str, Tensor]:
        return {"cl": functional.others_soft_ce(team.logits, temperature=self.temperature).sum()}


@register_strategy(
    "cl", losses={"ce": 0.5, "cl": 0.5}, title="Collaborative learning, CL (Song & Chai 2018)"
)
def cl(
    given: StrategyInputs,
    *,
    branches: int = 4,
    temperature: float = 2.0,
    cut: TapKey = "auto",
    share_gradient: bool = True,
) -> Method:
    """branches: heads behind the cut; cut: a stage or a module's name; share_gradient: the division by their number."""

    def join(taps: Taps, stage: TapKey) -> Others:
        return Others(temperature=temperature)

    return build_branches(
        given,
        join,
        branches=branches,
        cut=cut,
        weights=given.weights,
        share_gradient=share_gradient,
    )
