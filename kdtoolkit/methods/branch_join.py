"""What joins branches: their losses on each other, and their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from kdtoolkit.types import TapKey


class BranchOutputs(NamedTuple):
    """What one forward of all branches gives to a join.

    Attributes:
        logits: Of every branch, in order, (B, C) each.
        embeddings: Inputs of their classifiers, (B, D) each; empty unless the join has
            `reads_embeddings = True`.
        shared: The trunk's feature at the cut, in the network's own layout; None where every branch
            saw its own view.
        feats: Features of every branch at its taps, by tap, those in front of the cut included.
    """

    logits: list[Tensor]
    embeddings: list[Tensor]
    shared: Tensor | None
    feats: Sequence[Mapping[TapKey, Tensor]] = ()


class BranchJoin(nn.Module):
    """Base of what joins branches; `Branches` also takes other modules with these members.

    Attributes:
        terms: Names of its losses.
        reads_embeddings: Whether it reads the inputs of the classifiers.
        reads_shared: Whether it reads the feature at the cut, so that branches cannot have their
            own views.
    """

    terms: tuple[str, ...] = ()
    reads_embeddings: bool = False
    reads_shared: bool = False

    def forward(self, outputs: BranchOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            outputs: Of all branches.
            labels: (B,) class ids.

        Returns:
            An unweighted scalar for each of `terms`.
        """
        raise NotImplementedError

    def ensemble(self, outputs: BranchOutputs) -> Tensor:
        """Logits (B, C) of the ensemble of all branches."""
        raise NotImplementedError
