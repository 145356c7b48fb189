"""Peer collaborative learning, PCL (Wu, Gong 2021, arXiv 2006.04147).

Loss     CE(z_e) + sum over branches of CE(z_k) + w(e) KD(z_k, z_e) + w(e) mean_{j != k} KD(z_k, m_j), targets detached;
         z_e classifies the branches' concatenated embeddings, m_j is branch j of an EMA of the whole network (0.999);
         T = 3, w(e) = exp(-5 (1 - e / 80)^2) in 300 epochs. Every branch, and its average, sees a view of its own
Differs  nothing from the paper; the published reproduction has e / weight in w, which is 0 for most of 80 epochs
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branches import Branches, BranchJoin, build_branches
from kdtoolkit.models.head import num_outputs
from kdtoolkit.models.subnetwork import embedding_size
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import LossWeight, TapKey
from kdtoolkit.utils.validation import check_temperature


class EnsembleClassifier(nn.Module):
    """One Linear on the embeddings of all branches side by side, (B, K D) -> (B, C).

    size, branches, classes  D, K and C;  temperature  no unit, > 0
    """

    terms = ("ce/ensemble", "ensemble")
    reads_embeddings = True

    def __init__(self, size: int, branches: int, classes: int, *, temperature: float = 3.0):
        super().__init__()
        check_temperature(temperature)
        self.classifier, self.temperature = nn.Linear(size * branches, classes), temperature

    def ensemble(self, team: BranchJoin) -> Tensor:
        return self.classifier(torch.cat(team.embeddings, dim=1))

    def forward(self, team: BranchJoin, labels: Tensor) -> dict[str, Tensor]:
        ensemble = self.ensemble(team)
        soft = functional.kd_ensemble(team.logits, ensemble, temperature=self.temperature)
        return {"ce/ensemble": functional.ce(ensemble, labels), "ensemble": soft.sum()}


def pcl_branches(
    given: StrategyInputs,
    weights: Mapping[str, LossWeight],
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
) -> Branches:
    """Branches that see views of their own, joined by an ensemble classifier; `weights` of "ce", "ce/ensemble" and
    "ensemble" are read."""

    def join(taps: Taps, stage: TapKey) -> EnsembleClassifier:
        return EnsembleClassifier(
            embedding_size(taps), branches, num_outputs(taps), temperature=temperature
        )

    own = {term: weights[term] for term in ("ce", *EnsembleClassifier.terms)}
    return build_branches(given, join, branches=branches, cut=cut, weights=own, views=True)


@register_strategy(
    "pcl",
    losses={
        "ce": 1.0,
        "ce/ensemble": 1.0,
        "ensemble": SigmoidRampUp(1.0),
        "ema": SigmoidRampUp(1.0),
    },
    title="Peer collaborative learning, PCL (Wu & Gong 2021)",
)
def pcl(
    given: StrategyInputs,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    ema_decay: float | None = None,
    rampup_epochs: float | None = None,
) -> Method:
    """branches: copies of what lies behind the cut; cut: a stage or a module's name; ema_decay: share of the average in
    each of its updates; rampup_epochs: length of w."""
    weights = with_rampup(given.weights, ["ensemble", "ema"], rampup_epochs)
    method = pcl_branches(given, weights, branches=branches, temperature=temperature, cut=cut)
    if weights["ema"] != 0:
        method.callbacks = (
            EMATeacher(weights["ema"], decay=ema_decay, temperature=temperature, product="PCL"),
        )
    return method
