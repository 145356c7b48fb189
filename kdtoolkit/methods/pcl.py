"""Peer collaborative learning, PCL (Wu, Gong 2021, arXiv 2006.04147).

Loss: CE(z_e) + sum over branches k of CE(z_k) + w(e) KD(z_k, z_e) + w(e) mean_{j != k} KD(z_k,
m_j), targets detached; z_e classifies the branches' concatenated embeddings, m_j is branch j of an
exponential moving average (EMA) of the whole network, decay 0.999; T = 3, w(e) = exp(-5 (1 - e /
80)^2) in 300 epochs. Every branch, and its average, sees its own view.

Differs: nothing from the paper; the published reproduction has e / weight in w, which is 0 for most
of 80 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branch_join import BranchJoin, BranchOutputs
from kdtoolkit.methods.branches import Branches
from kdtoolkit.methods.build_branches import build_branches
from kdtoolkit.models.embedding import embedding_size
from kdtoolkit.models.head import num_outputs
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import LossWeight, TapKey
from kdtoolkit.utils.validation import check_temperature


class EnsembleClassifier(BranchJoin):
    """One linear classifier of the concatenated embeddings of all branches, (B, K D) -> (B, C).

    Args:
        size: D, of each embedding.
        branches: K, the number of branches.
        classes: C, the number of classes.
        temperature: No unit, above 0.
    """

    terms = ("ce/ensemble", "ensemble")
    reads_embeddings = True

    def __init__(self, size: int, branches: int, classes: int, *, temperature: float = 3.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.classifier = nn.Linear(size * branches, classes)
        self.temperature = temperature

    def ensemble(self, outputs: BranchOutputs) -> Tensor:
        """Logits (B, C) of the classifier."""
        logits: Tensor = self.classifier(torch.cat(outputs.embeddings, dim=1))
        return logits

    def forward(self, outputs: BranchOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the ensemble, and what the branches learn from it."""
        ensemble = self.ensemble(outputs)
        kd = functional.kd_ensemble(outputs.logits, ensemble, temperature=self.temperature)
        return {"ce/ensemble": functional.ce(ensemble, labels), "ensemble": kd.sum()}


def pcl_branches(
    inputs: StrategyInputs,
    weights: Mapping[str, LossWeight],
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
) -> Branches:
    """Build branches that see their own views, joined by an ensemble classifier.

    Args:
        inputs: The student, and what builds further networks.
        weights: Weights, of which those of "ce", "ce/ensemble" and "ensemble" are read.
        branches: Number of branches, the student among them, from 2.
        temperature: Of the ensemble's and the branches' probabilities, no unit, above 0.
        cut: Stage number or module name behind which the branches part; "auto" is the last boundary
            in front of the last stage.

    Returns:
        The method, without its EMA teacher.
    """

    def make_join(taps: Taps, stage: TapKey) -> EnsembleClassifier:
        return EnsembleClassifier(
            embedding_size(taps), branches, num_outputs(taps), temperature=temperature
        )

    own = {term: weights[term] for term in ("ce", *EnsembleClassifier.terms)}
    return build_branches(inputs, make_join, branches=branches, cut=cut, weights=own, views=True)


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
    inputs: StrategyInputs,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    ema_decay: float | None = None,
    rampup_epochs: float | None = None,
) -> Method:
    """Build peer collaborative learning of branches, their ensemble and their averages.

    Args:
        inputs: The student, weights, and what builds further networks.
        branches: Number of branches, the student among them, from 2.
        temperature: Of targets and predictions, no unit, above 0.
        cut: Stage number or module name behind which the branches part; "auto" is the last boundary
            in front of the last stage.
        ema_decay: Share of the average in each of its updates, from 0 to 1; None is 0.999, less in
            short runs.
        rampup_epochs: Epochs over which the weights of "ensemble" and "ema" rise, from 0; None is
            80 in runs of 300 epochs and more, and the same share of shorter ones.

    Returns:
        The method; a branch of the average is exported.
    """
    weights = with_rampup(inputs.weights, ["ensemble", "ema"], rampup_epochs)
    method = pcl_branches(inputs, weights, branches=branches, temperature=temperature, cut=cut)
    if weights["ema"] != 0:
        method.callbacks = (
            EMATeacher(weights["ema"], decay=ema_decay, temperature=temperature, export="PCL"),
            Diversity(),
        )
    return method
