"""Collaborative learning, CL (Song, Chai 2018, arXiv 1805.11761).

Loss: sum over heads h of beta CE(z_h) + (1 - beta) CE(q_h, z_h / T), where q_h is the softmax of
the mean of the other heads' logits over T, detached; beta = 0.5 (the weights of "ce" and "cl"), T =
2. The gradient that enters what the heads share is divided by their number.

Differs: one split in place of a tree of several; no T^2, which could not be confirmed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branch_join import BranchJoin, BranchOutputs
from kdtoolkit.methods.build_branches import build_branches
from kdtoolkit.types import TapKey
from kdtoolkit.utils.validation import check_temperature


class OthersMean(BranchJoin):
    """Every head learns from the mean logits of all others; it has no parameters.

    Args:
        temperature: No unit, above 0.
    """

    terms = ("cl",)

    def __init__(self, *, temperature: float = 2.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def ensemble(self, outputs: BranchOutputs) -> Tensor:
        """The mean of all heads' logits, (B, C)."""
        return torch.stack(outputs.logits).mean(0)

    def forward(self, outputs: BranchOutputs, labels: Tensor) -> dict[str, Tensor]:
        """The sum of the heads' soft cross-entropies, "cl"."""
        losses = functional.mutual_loss(
            outputs.logits, temperature=self.temperature, target="ensemble", form="soft-ce"
        )
        return {"cl": losses.sum()}


@register_strategy(
    "cl", losses={"ce": 0.5, "cl": 0.5}, title="Collaborative learning, CL (Song & Chai 2018)"
)
def cl(
    inputs: StrategyInputs,
    *,
    branches: int = 4,
    temperature: float = 2.0,
    cut: TapKey = "auto",
    share_gradient: bool = True,
) -> Method:
    """Build collaborative learning between heads of one network.

    Args:
        inputs: The student, weights, and what builds further networks.
        branches: Number of heads, the student's among them, from 2.
        temperature: Of the heads' probabilities, no unit, above 0.
        cut: Stage number or module name behind which the heads part; "auto" is the last boundary in
            front of the last stage.
        share_gradient: Whether the gradient that enters the shared part is divided by the number of
            heads.

    Returns:
        The method.
    """

    def make_join(taps: Taps, stage: TapKey) -> OthersMean:
        return OthersMean(temperature=temperature)

    return build_branches(
        inputs,
        make_join,
        branches=branches,
        cut=cut,
        weights=inputs.weights,
        share_gradient=share_gradient,
    )
