"""Peers: several networks trained in one run, each on the labels; what they teach each other is added by callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..method import Method
from ..preprocess import Preprocess
from ..types import Batch, Clock, Step

PRODUCT = "student"


class Peers(Method):
    """K networks of one or several architectures, each with weights, normalisation and image size of its own.

    networks         nn.Modules that map images (B, 3, H, W) to logits (B, C); the first is the product, "student", the
                     others are "peer1", "peer2", ...
    views            True gives every network an augmentation of its own of the same images
    label_smoothing  of the cross-entropy, in [0, 1)
    image            (H, W) of the data, where a network's own size is fixed and differs

    Losses "ce" of the product and "ce/peer1", ... of the others, all with weight 1. Without anything that joins them,
    every network trains as it would alone, to the last digit.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        views: bool = False,
        label_smoothing: float = 0.0,
        image: tuple[int, int] | None = None,
    ):
        super().__init__()
        networks = list(networks)
        if not networks:
            raise ValueError("Peers([]): give at least one network")
        shared = {id(p) for p in networks[0].parameters()}
        for number, net in enumerate(networks[1:], 1):
            if any(id(p) in shared for p in net.parameters()):
                raise ValueError(
                    f"network {number} of Peers has parameters in common with an earlier one: each must have its own "
                    "weights, build it again or use copy.deepcopy and other initial weights"
                )
            shared |= {id(p) for p in net.parameters()}
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 1)")
        self.peers = nn.ModuleDict({name_of(k): net for k, net in enumerate(networks)})
        self.label_smoothing = label_smoothing
        self.num_views = len(networks) if views else 1
        self.preprocess = {name: Preprocess.of(net, image) for name, net in self.networks().items()}

    def forward(self, batch: Batch, clock: Clock) -> Step:
        logits = dict(self.each(batch))
        smoothing = {"label_smoothing": self.label_smoothing}
        losses = {loss_of(name): functional.ce(z, batch["y"], **smoothing) for name, z in logits.items()}
        return Step(losses, logits)

    def each(self, batch: Batch) -> list[tuple[str, Tensor]]:
        """Logits (B, C) of every network, in order, each from the same random state."""
        seed, found = torch.initial_seed(), []
        for k, name in enumerate(self.peers):
            if k:
                torch.manual_seed(seed)  # dropout as if it were alone
            x = batch["x"] if self.num_views == 1 else batch["views"][:, k]
            found.append((name, self.logits(name, x)))
        return found

    def networks(self) -> dict[str, nn.Module]:
        return dict(self.peers)

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.peers[name](self.preprocess[name](x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for net in self.peers.values():
            net.compile()

    def plan(self) -> dict[str, Any]:
        told = {"weight": 1.0, "teacher": "labels"}
        rows = [{"loss": loss_of(name), "student": f"{name} logits", **told} for name in self.peers]
        counts = {name: sum(p.numel() for p in net.parameters()) for name, net in self.peers.items()}
        return {"losses": rows, "parameters": counts}

    def clipped(self) -> list[list[nn.Parameter]]:
        return [list(net.parameters()) for net in self.peers.values()]


def name_of(k: int) -> str:
    return PRODUCT if k == 0 else f"peer{k}"


def loss_of(name: str) -> str:
    return "ce" if name == PRODUCT else f"ce/{name}"
