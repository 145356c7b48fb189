"""Online distillation with diverse peers, OKDDip (Chen, Mei, Wang, Feng, Chen 2020, arXiv 1912.00350).

Loss     sum over peers and leader of CE, + w(e) [sum over peers of KL(target_i || p_i) + KL(peers' mean || leader)];
         target_i = sum_j a_ij z_j, a_ij = softmax_j(W_q h_i . W_k h_j) of embeddings h; KL with T = 3 and T^2; targets
         are not detached, so that the attention learns. w(e) = exp(-5 (1 - e / 80)^2) in 300 epochs
Differs  nothing from the code, which mixes logits where the paper mixes softened predictions. The leader is the student
         and the product; the peers are branch1, branch2, ...
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
from kdtoolkit.models.subnetwork import embedding_size
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import TapKey
from kdtoolkit.utils.validation import check_temperature

REDUCTION = 8  # D over the width of queries and keys


class Attention(nn.Module):
    """How much each peer listens to each: queries and keys of their embeddings (B, D), without bias.

    size  D;  temperature  no unit, > 0
    """

    terms = ("peers", "leader")
    reads_embeddings = True

    def __init__(self, size: int, *, temperature: float = 3.0):
        super().__init__()
        check_temperature(temperature)
        width = max(1, size // REDUCTION)
        self.query, self.key = (
            nn.Linear(size, width, bias=False),
            nn.Linear(size, width, bias=False),
        )
        self.temperature = temperature

    def attention(self, embeddings: list[Tensor]) -> Tensor:
        """(B, K, K) of K peers."""
        return functional.okddip_attention(
            [self.query(h) for h in embeddings], [self.key(h) for h in embeddings]
        )

    def ensemble(self, team: BranchJoin) -> Tensor:
        """What the leader learns from: the mean of the peers."""
        return torch.stack(team.logits[1:]).mean(0)

    def forward(self, team: BranchJoin, labels: Tensor) -> dict[str, Tensor]:
        leader, *peers = team.logits
        attention = self.attention(team.embeddings[1:])
        options = {"temperature": self.temperature}
        each = functional.okddip_peers(peers, attention, **options)
        return {
            "peers": each.sum(),
            "leader": functional.okddip_leader([*peers, leader], **options),
        }


@register_strategy(
    "okddip",
    losses={"ce": 1.0, "peers": SigmoidRampUp(1.0), "leader": SigmoidRampUp(1.0)},
    title="Online distillation with diverse peers, OKDDip (Chen et al. 2020)",
)
def okddip(
    given: StrategyInputs,
    *,
    branches: int = 4,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    rampup_epochs: float | None = None,
) -> Method:
    """branches: the leader and its peers, from 3; cut: a stage or a module's name; rampup_epochs: length of w."""
    if branches == 2:
        raise ValueError("branches is 2: OKDDip needs a leader and two peers or more, 3 in all")
    weights = with_rampup(given.weights, ["peers", "leader"], rampup_epochs)

    def join(taps: Taps, stage: TapKey) -> Attention:
        return Attention(embedding_size(taps), temperature=temperature)

    return build_branches(given, join, branches=branches, cut=cut, weights=weights, best=False)
