"""Builds the peers of a strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.data.seeding import derive_seed
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.peers import Peers
from kdtoolkit.models.copying import copy_network
from kdtoolkit.models.head import classifier_names
from kdtoolkit.models.reinit import reinitialise_modules
from kdtoolkit.utils.validation import check_choice, describe_value, plain_scalar

MAX_PEERS = 1000  # far more than any machine holds
REDRAWN = {  # value -> what the plan says after "all networks begin with the student's weights"
    "auto": "",
    "none": "",
    "head": ", each with another classifier",
    "head+stem": ", each with another classifier and another first convolution",
}
PeerSelection = int | Sequence[str | nn.Module]


def build_peers(
    inputs: StrategyInputs,
    peers: PeerSelection,
    *,
    views: bool,
    label_smoothing: float,
    spread: bool | str,
    batches: str = "shared",
    redraw: str = "auto",
) -> Peers:
    """Build the peers of a strategy.

    Args:
        inputs: The student, and what builds further networks.
        peers: Number of networks, from 2, the student among them, all of its architecture; or a
            list of further networks, names or modules.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        spread: Whether networks are spread over processes; see `Peers`.
        batches: "shared", or "own" for a batch of its own for every network; see `Peers`.
        redraw: "auto": further networks are built as the student is, random weights with seeds of
            their own and given weights again. Otherwise they are copies of the student, in which
            "none" of it, the "head", or "head+stem" (classifier and first convolution) is
            re-initialised, of every network with another seed, the student's own too.

    Returns:
        The method.

    Raises:
        ValueError: For fewer than two networks, and for a list of networks with `redraw`.
    """
    check_choice("redraw", redraw, tuple(REDRAWN))
    if redraw == "auto":
        networks = [inputs.student.model, *_further_networks(inputs, peers)]
    else:
        networks = _redrawn_copies(inputs, peers, redraw)
    method = Peers(
        networks,
        weight=inputs.weights["ce"],
        views=views,
        label_smoothing=label_smoothing,
        image=inputs.image,
        spread=spread,
        batches=batches,
    )
    if redraw != "auto":
        method.notes.append(f"all networks begin with the student's weights{REDRAWN[redraw]}")
    return method


def _further_networks(inputs: StrategyInputs, peers: PeerSelection) -> list[nn.Module]:
    if isinstance(peers, (list, tuple)) and peers:
        return [inputs.make_network(k, spec) for k, spec in enumerate(peers, 1)]
    return [inputs.make_network(k) for k in range(1, _check_count(peers))]


def _redrawn_copies(inputs: StrategyInputs, peers: PeerSelection, redraw: str) -> list[nn.Module]:
    """The student and copies of it, with parts re-initialised in each."""
    if isinstance(peers, (list, tuple)):
        raise ValueError(
            f"redraw={redraw!r} makes copies of the student, and peers names the networks: pass "
            "their number as peers, or leave redraw out"
        )
    student = inputs.student
    names = [] if redraw == "none" else classifier_names(student)
    if redraw == "head+stem":
        names.append(_first_convolution(student))
    count = _check_count(peers)
    networks = [student.model, *(copy_network(student.model) for _ in range(1, count))]
    is_planned = torch.get_default_device().type == "meta"  # and a plan changes no given network
    for k, network in enumerate(networks):
        if not names or (k == 0 and is_planned):
            continue
        reinitialise_modules(network, names, derive_seed(torch.initial_seed(), k))
    return networks


def _first_convolution(taps: Taps) -> str:
    """Name of the convolution that runs first."""
    modules = dict(taps.model.named_modules())
    calls = [c for calls in taps.trace.calls.values() for c in calls]
    for call in sorted(calls, key=lambda call: call.called_at):
        if isinstance(modules[call.name], _ConvNd):
            return call.name
    raise ValueError(
        f"redraw='head+stem': {type(taps.model).__name__} has no convolution: pass redraw='head'"
    )


def _check_count(peers: PeerSelection) -> int:
    peers = plain_scalar(peers)  # type: ignore[assignment]
    if isinstance(peers, bool) or not isinstance(peers, int) or not 2 <= peers <= MAX_PEERS:
        raise ValueError(
            f"peers is {describe_value(peers)}; allowed: a whole number of networks from 2, "
            "the student among them, or a list of further networks (names or modules)"
        )
    return peers
