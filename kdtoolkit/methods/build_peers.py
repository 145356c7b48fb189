"""Builds the peers of a strategy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.peers import Peers
from kdtoolkit.utils.validation import describe_value, plain_scalar

MAX_PEERS = 1000  # far more than any machine holds
PeerSelection = int | Sequence[str | nn.Module]


def build_peers(
    inputs: StrategyInputs,
    peers: PeerSelection,
    *,
    views: bool,
    label_smoothing: float,
    spread: bool | str,
) -> Peers:
    """Build the peers of a strategy.

    Args:
        inputs: The student, and what builds further networks.
        peers: Number of networks, from 2, the student among them, all of its architecture; or a
            list of further networks, names or modules.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        spread: Whether networks are spread over processes; see `Peers`.

    Returns:
        The method.

    Raises:
        ValueError: For fewer than two networks.
    """
    return Peers(
        [inputs.student.model, *_further_networks(inputs, peers)],
        weight=inputs.weights["ce"],
        views=views,
        label_smoothing=label_smoothing,
        image=inputs.image,
        spread=spread,
    )


def _further_networks(inputs: StrategyInputs, peers: PeerSelection) -> list[nn.Module]:
    peers = plain_scalar(peers)  # type: ignore[assignment]
    if isinstance(peers, (list, tuple)) and peers:
        return [inputs.make_network(k, spec) for k, spec in enumerate(peers, 1)]
    if isinstance(peers, bool) or not isinstance(peers, int) or not 2 <= peers <= MAX_PEERS:
        raise ValueError(
            f"peers is {describe_value(peers)}; allowed: a whole number of networks from 2, "
            "the student among them, or a list of further networks (names or modules)"
        )
    return [inputs.make_network(k) for k in range(1, peers)]
