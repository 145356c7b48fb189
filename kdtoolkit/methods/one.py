"""On-the-fly native ensemble, ONE (Lan, Zhu, Gong 2018, arXiv 1806.04606).

Loss: sum over branches k of CE(z_k), plus CE(z_e), plus w(e) times the sum over branches of T^2
KL(p(z_e) || p(z_k)), where z_e = sum_k g_k z_k is detached; T = 3, w(e) = exp(-5 (1 - e / 80)^2) in
300 epochs. The gate g learns from CE(z_e) alone. 3 branches, each a copy of the last stage and the
classifier.

Differs: the gate pools over all positions at the cut, whatever the layout; the release writes the
size of the pooling window (16).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.layout_conversion import as_map
from kdtoolkit.methods.branch_join import BranchJoin, BranchOutputs
from kdtoolkit.methods.build_branches import build_branches
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import Shape, TapKey
from kdtoolkit.utils.validation import check_temperature


class GatedEnsemble(BranchJoin):
    """An ensemble of the branches, weighted by a gate for every image.

    The gate is: feature at the cut, average pooling, Linear, BatchNorm, ReLU, softmax.

    Args:
        shape: Shape of the feature at the cut.
        branches: K, the number of branches.
        temperature: No unit, above 0.
    """

    terms = ("ce/ensemble", "ensemble")
    reads_shared = True

    def __init__(self, shape: Shape, branches: int, *, temperature: float = 3.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.shape, self.temperature = shape, temperature
        self.score = nn.Sequential(
            nn.Linear(shape.channels, branches), nn.BatchNorm1d(branches), nn.ReLU()
        )

    def gates(self, shared: Tensor) -> Tensor:
        """Shares of the branches, (B, K), from the feature at the cut.

        Args:
            shared: The feature at the cut, in the layout of `shape`, with the batch.

        Returns:
            The shares; those of one image sum to 1.
        """
        pooled = as_map(shared, self.shape).mean((2, 3))
        return torch.softmax(self.score(pooled), dim=1)

    def ensemble(self, outputs: BranchOutputs) -> Tensor:
        """The gated sum of the branches' logits, (B, C)."""
        assert outputs.shared is not None  # Branches refuses views
        return functional.one_ensemble(outputs.logits, self.gates(outputs.shared))

    def forward(self, outputs: BranchOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the ensemble, and what the branches learn from it."""
        ensemble = self.ensemble(outputs)
        kd = functional.kd_ensemble_eps(outputs.logits, ensemble, temperature=self.temperature)
        return {"ce/ensemble": functional.ce(ensemble, labels), "ensemble": kd.sum()}


@register_strategy(
    "one",
    losses={"ce": 1.0, "ce/ensemble": 1.0, "ensemble": SigmoidRampUp(1.0)},
    title="On-the-fly native ensemble, ONE (Lan et al. 2018)",
)
def one(
    inputs: StrategyInputs,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    rampup_epochs: float | None = None,
) -> Method:
    """Build an on-the-fly native ensemble of branches with a gate.

    Args:
        inputs: The student, weights, and what builds further networks.
        branches: Number of branches, the student among them, from 2.
        temperature: Of the ensemble's and the branches' probabilities, no unit, above 0.
        cut: Stage number or module name behind which the branches part; "auto" is the last boundary
            in front of the last stage.
        rampup_epochs: Epochs over which the weight of "ensemble" rises, from 0; None is 80 in runs
            of 300 epochs and more, and the same share of shorter ones.

    Returns:
        The method.
    """
    weights = with_rampup(inputs.weights, ["ensemble"], rampup_epochs)

    def make_join(taps: Taps, stage: TapKey) -> GatedEnsemble:
        return GatedEnsemble(taps.boundary_of(stage).shape, branches, temperature=temperature)

    return build_branches(inputs, make_join, branches=branches, cut=cut, weights=weights)
