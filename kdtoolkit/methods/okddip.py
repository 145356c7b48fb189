"""Online distillation with diverse peers (Chen, Mei, Wang, Feng, Chen 2020, arXiv 1912.00350).

Loss: sum over peers and leader of CE, plus w(e) [sum over peers i of KL(target_i || p_i) + KL(mean
of the peers || leader)], where target_i = sum_j a_ij z_j and a_ij = softmax_j(W_q h_i . W_k h_j) of
embeddings h; KL with T = 3 and T^2; targets are not detached, so that the attention learns; w(e) =
exp(-5 (1 - e / 80)^2) in 300 epochs.

Differs: nothing from the code, which mixes logits where the paper mixes softened predictions. The
leader is the student, and is exported; the peers are branch1, branch2, ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branch_join import BranchJoin, BranchOutputs
from kdtoolkit.methods.branches import check_num_branches
from kdtoolkit.methods.build_branches import build_branches
from kdtoolkit.models.embedding import embedding_size
from kdtoolkit.schedules import SigmoidRampUp, with_rampup
from kdtoolkit.types import TapKey
from kdtoolkit.utils.validation import check_temperature

REDUCTION = 8  # size of the embeddings over that of queries and keys


class PeerAttention(BranchJoin):
    """How much each peer learns from each: queries and keys of their embeddings, without bias.

    Args:
        size: D, of the embeddings (B, D).
        temperature: No unit, above 0.
    """

    terms = ("peers", "leader")
    reads_embeddings = True

    def __init__(self, size: int, *, temperature: float = 3.0) -> None:
        super().__init__()
        check_temperature(temperature)
        width = max(1, size // REDUCTION)
        self.query = nn.Linear(size, width, bias=False)
        self.key = nn.Linear(size, width, bias=False)
        self.temperature = temperature

    def attention(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Attention (B, K, K) between K peers, from their embeddings (B, D).

        Args:
            embeddings: Embeddings (B, D) of the K peers.

        Returns:
            Share of peer j in the target of peer i, at [:, i, j]; every row sums to 1.
        """
        queries = [self.query(embedding) for embedding in embeddings]
        keys = [self.key(embedding) for embedding in embeddings]
        return functional.okddip_attention(queries, keys)

    def ensemble(self, outputs: BranchOutputs) -> Tensor:
        """The mean of the peers' logits, (B, C), which the leader learns from."""
        return torch.stack(outputs.logits[1:]).mean(0)

    def forward(self, outputs: BranchOutputs, labels: Tensor) -> dict[str, Tensor]:
        """What the peers learn from each other, and the leader from the peers."""
        leader, *peers = outputs.logits
        attention = self.attention(outputs.embeddings[1:])
        each = functional.okddip_peers(peers, attention, temperature=self.temperature)
        last = functional.okddip_leader([*peers, leader], temperature=self.temperature)
        return {"peers": each.sum(), "leader": last}


@register_strategy(
    "okddip",
    losses={"ce": 1.0, "peers": SigmoidRampUp(1.0), "leader": SigmoidRampUp(1.0)},
    title="Online distillation with diverse peers, OKDDip (Chen et al. 2020)",
)
def okddip(
    inputs: StrategyInputs,
    *,
    branches: int = 4,
    temperature: float = 3.0,
    cut: TapKey = "auto",
    rampup_epochs: float | None = None,
) -> Method:
    """Build online distillation of a leader with diverse peers.

    Args:
        inputs: The student, weights, and what builds further networks.
        branches: Number of branches, the leader (the student) and its peers, from 3.
        temperature: Of targets and predictions, no unit, above 0.
        cut: Stage number or module name behind which the branches part; "auto" is the last boundary
            in front of the last stage.
        rampup_epochs: Epochs over which the weights of "peers" and "leader" rise, from 0; None is
            80 in runs of 300 epochs and more, and the same share of shorter ones.

    Returns:
        The method; the student is exported.
    """
    check_num_branches(branches)
    if branches == 2:
        raise ValueError("branches is 2: OKDDip needs a leader and two peers or more, 3 in all")
    weights = with_rampup(inputs.weights, ["peers", "leader"], rampup_epochs)

    def make_join(taps: Taps, stage: TapKey) -> PeerAttention:
        return PeerAttention(embedding_size(taps), temperature=temperature)

    return build_branches(
        inputs, make_join, branches=branches, cut=cut, weights=weights, best=False
    )
