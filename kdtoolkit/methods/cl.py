"""Collaborative learning, CL (Song, Chai 2018, arXiv 1805.11761).

Loss     sum over heads of beta CE(z_h) + (1 - beta) CE(q_h, z_h / T), q_h = softmax(mean of the others' logits / T),
         detached; beta = 0.5 (the weights of "ce" and "cl"), T = 2. The gradient that enters what the heads share is
         divided by their number
Differs  one split in place of a tree of several; no T^2, which could not be confirmed
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..functional.logits import check_temperature
from ..method import Given, Method, strategy
from ..taps import Taps
from ..types import Stage
from .branches import Team, build


class Others(nn.Module):
    """Every head learns from the mean logits of all others. It has no parameters. `temperature` has no unit, > 0."""

    terms = ("cl",)

    def __init__(self, *, temperature: float = 2.0):
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def ensemble(self, team: Team) -> Tensor:
        return torch.stack(team.logits).mean(0)

    def forward(self, team: Team, labels: Tensor) -> dict[str, Tensor]:
        return {"cl": functional.others_soft_ce(team.logits, temperature=self.temperature).sum()}


@strategy("cl", losses={"ce": 0.5, "cl": 0.5}, title="Collaborative learning, CL (Song & Chai 2018)")
def cl(
    given: Given,
    *,
    branches: int = 4,
    temperature: float = 2.0,
    cut: Stage = "auto",
    share_gradient: bool = True,
) -> Method:
    """branches: heads behind the cut; cut: a stage or a module's name; share_gradient: the division by their number."""

    def join(taps: Taps, stage: Stage) -> Others:
        return Others(temperature=temperature)

    return build(given, join, branches=branches, cut=cut, weights=given.weights, share_gradient=share_gradient)
