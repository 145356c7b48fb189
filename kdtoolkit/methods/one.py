"""On-the-fly native ensemble, ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606).

Loss     sum over branches of CE(z_k), CE(z_e), and w(e) * sum over branches of T^2 KL(p(z_e) || p(z_k)), z_e detached
         there; z_e = sum_k g_k z_k, T = 3, w(e) = exp(-5 (1 - e / 80)^2) in 300 epochs. The gate g learns from CE(z_e)
         alone. 3 branches, each a copy of the last stage and the classifier
Differs  the gate pools over all positions at the cut, whatever the layout; the release writes the pool's size (16)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.adapters import as_map
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branches import BranchJoin, build_branches
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import Shape, TapKey
from kdtoolkit.utils.validation import check_temperature


class Gate(nn.Module):
    """Shares of the branches, (B, K): pooled map at the cut -> Linear -> BatchNorm -> ReLU -> softmax.

    shape        of the feature at the cut;  branches  K
    temperature  no unit, > 0
    """

    terms = ("ce/ensemble", "ensemble")
    reads_shared = True

    def __init__(self, shape: Shape, branches: int, *, temperature: float = 3.0):
        super().__init__()
        self.shape, self.temperature = shape, temperature
        check_temperature(temperature)
        self.score = nn.Sequential(
            nn.Linear(shape.channels, branches), nn.BatchNorm1d(branches), nn.ReLU()
        )

    def gates(self, shared: Tensor) -> Tensor:
        pooled = as_map(shared, self.shape).mean((2, 3))
        return torch.softmax(self.score(pooled), dim=1)

    def ensemble(self, team: BranchJoin) -> Tensor:
        assert team.shared is not None  # Branches refuses views
        return functional.one_ensemble(team.logits, self.gates(team.shared))

    def forward(self, team: BranchJoin, labels: Tensor) -> dict[str, Tensor]:
        ensemble = self.ensemble(team)
        soft = functional.kd_ensemble_eps(team.logits, ensemble, temperature=self.temperature)
        return {"ce/ensemble": functional.ce(ensemble, labels), "ensemble": soft.sum()}


@register_strategy(
    "one",
    losses={"ce": 1.0, "ce/ensemble": 1.0, "ensemble": SigmoidRampUp(1.0)},
    title="On-the-fly native ensemble, ONE (Lan et al. 2018)",
)
def one(
    given: StrategyInputs,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    rampup_epochs: float | None = None,
) -> Method:
    """branches: copies of what lies behind the cut; cut: a stage or a module's name; rampup_epochs: length of w."""
    weights = with_rampup(given.weights, ["ensemble"], rampup_epochs)

    def join(taps: Taps, stage: TapKey) -> Gate:
        return Gate(taps.end(stage).shape, branches, temperature=temperature)

    return build_branches(given, join, branches=branches, cut=cut, weights=weights)
