"""Peers: several networks trained in one run, each on the labels; what they teach each other is added by callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Step
from kdtoolkit.utils import distributed

PRODUCT = "student"


class Peers(Method):
    """K networks of one or several architectures, each with weights, normalisation and image size of its own.

    networks         nn.Modules that map images (B, 3, H, W) to logits (B, C): "student", "peer1", "peer2", ...
    weight           of every cross-entropy, number or schedule
    views            True gives every network an augmentation of its own of the same images
    label_smoothing  of the cross-entropy, in [0, 1)
    image            (H, W) of the data, where a network's own size is fixed and differs
    spread           True trains networks k, k + P, ... on process k of P, each on the whole batch, and exchanges logits
                     after every forward: what one process does, bit for bit, at the cost of one network each. False
                     trains all on every process, each on its share of the batch. "auto" spreads where P divides K
    unlabelled       takes rows without a label (-1): they count in the batch that a cross-entropy is divided by, and
                     add nothing to it

    Losses "ce" of the student and "ce/peer1", ... of the others. Without anything that joins them, every network trains
    as it would alone, to the last digit. Of networks of one architecture the best on the validation split is the
    product, of others the first.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        weight: LossWeight = 1.0,
        views: bool = False,
        label_smoothing: float = 0.0,
        image: tuple[int, int] | None = None,
        spread: bool | str = "auto",
        unlabelled: bool = False,
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
        for option, given in (("views", views), ("spread", spread)):
            if given not in (True, False, *(["auto"] if option == "spread" else [])):
                raise ValueError(
                    f"{option} is {given!r}; allowed: True, False{', auto' * (option == 'spread')}"
                )
        check_loss_weight(weight)
        if not views:
            _check_twins(networks)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 1)")
        self.peers = nn.ModuleDict({name_of(k): net for k, net in enumerate(networks)})
        self.weight, self.label_smoothing, self.spread = weight, label_smoothing, spread
        self.num_views, self.uses_unlabelled = len(networks) if views else 1, bool(unlabelled)
        self.preprocess = {name: Preprocess.of(net, image) for name, net in self.networks().items()}

    def forward(self, batch: Batch, clock: Clock) -> Step:
        logits, weight = self.train_logits(batch), weight_at(self.weight, clock)
        losses = {loss_of(name): weight * self._ce(z, batch["y"]) for name, z in logits.items()}
        return Step(losses, logits)

    def _ce(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.uses_unlabelled:
            return functional.ce(logits, labels, label_smoothing=self.label_smoothing)
        z, smoothing = functional.at_least_float32(logits), self.label_smoothing
        return F.cross_entropy(
            z, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
        ) / len(labels)

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, C) of every network, in order, each from the same random state; those of other processes'
        networks without gradient."""
        seed, found = torch.initial_seed(), {}
        for k, name in enumerate(self.peers):
            if self._mine(k):
                torch.manual_seed(seed)  # dropout as if it were alone
                found[name] = self.logits(
                    name, batch["x"] if self.num_views == 1 else batch["views"][:, k]
                )
        return self._gathered(found) if self.networks_per_process else found

    def networks(self) -> dict[str, nn.Module]:
        return dict(self.peers)

    def export_candidates(self) -> tuple[list[str], str]:
        kinds = {
            tuple((n, tuple(p.shape)) for n, p in net.named_parameters())
            for net in self.peers.values()
        }
        if len(self.peers) > 1 and len(kinds) == 1:
            return list(self.peers), "its peers have the same architecture"
        return super().export_candidates()

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.peers[name](self.preprocess[name](x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for net in self.peers.values():
            net.compile()

    def plan(self) -> dict[str, Any]:
        same = {"weight": describe_weight(self.weight), "teacher": "labels"}
        rows = [{"loss": loss_of(name), "student": f"{name} logits", **same} for name in self.peers]
        counts = {name: num_parameters(net) for name, net in self.peers.items()}
        many, notes = distributed.world_size(), []
        if many > 1 and not self.networks_per_process:
            notes = [
                f"every one of {many} processes trains all networks, each on its share of the batch"
            ]
        elif many > 1:
            notes = [
                f"the networks are spread over {many} processes, each trains its own on the whole batch"
            ]
        return {"losses": rows, "parameters": counts, "notes": notes}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [
            list(net.parameters()) for k, net in enumerate(self.peers.values()) if self._mine(k)
        ]

    # ------------------------------------------------------------------------------------------- over several processes
    def place_teachers(self, *args: Any, **kwargs: Any) -> None:
        super().place_teachers(*args, **kwargs)
        processes, count = distributed.world_size(), len(self.peers)
        if self.spread is True and count % processes:
            raise ValueError(
                f"spread=True: {count} networks cannot be shared out equally among {processes} processes; launch a "
                f"number of processes that divides {count}, or pass spread=False"
            )

    @property
    def networks_per_process(self) -> bool:  # type: ignore[override]
        processes = distributed.world_size()
        return processes > 1 and self.spread is not False and len(self.peers) % processes == 0

    def _mine(self, k: int) -> bool:
        return not self.networks_per_process or k % distributed.world_size() == distributed.rank()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        mine = {name for k, name in enumerate(self.peers) if self._mine(k)}
        return {name: p for name, p in self.named_parameters() if name.split(".")[1] in mine}

    def _gathered(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        all_logits = distributed.all_gather(
            torch.stack([z.detach() for z in mine.values()])
        )  # by process, (K / P, B, C)
        processes = distributed.world_size()
        each = {
            name: all_logits[k % processes][k // processes] for k, name in enumerate(self.peers)
        }
        return {name: mine.get(name, z) for name, z in each.items()}

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        if not self.networks_per_process:
            return
        for k, net in enumerate(self.peers.values()):
            source = k % distributed.world_size()
            distributed.broadcast_parameters(source, [*net.parameters(), *net.buffers()])
            if optimizer is not None:
                distributed.broadcast_optimizer_state(source, optimizer, list(net.parameters()))


def build_peers(
    given: StrategyInputs, peers: Any, *, views: bool, label_smoothing: float, spread: bool | str
) -> Peers:
    """The student and further networks: `peers` in all, of its architecture, or those of a list."""
    networks = [given.student.model, *_others(given, peers)]
    return Peers(
        networks, weight=given.weights["ce"], views=views, label_smoothing=label_smoothing, image=given.image,
        spread=spread,
    )  # fmt: skip


def _others(given: StrategyInputs, peers: Any) -> list[nn.Module]:
    if isinstance(peers, (list, tuple)) and peers:
        return [given.another(k, spec) for k, spec in enumerate(peers, 1)]
    if isinstance(peers, bool) or not isinstance(peers, int) or peers < 2:
        raise ValueError(
            f"peers is {peers!r}: a number of networks from 2, the student among them, or a list of further networks "
            "(names or modules)"
        )
    return [given.another(k) for k in range(1, peers)]


def _check_twins(networks: Sequence[nn.Module]) -> None:
    """ValueError for two networks with equal weights: on the same images they would stay one."""
    for number, net in enumerate(networks):
        own = dict(net.named_parameters())
        for other, before in enumerate(dict(n.named_parameters()) for n in networks[:number]):
            same = own.keys() == before.keys() and all(
                p.shape == before[k].shape for k, p in own.items()
            )
            if (
                same
                and own
                and all(not p.is_meta and torch.equal(p, before[k]) for k, p in own.items())
            ):
                raise ValueError(
                    f"networks {other} and {number} of Peers have equal first weights, and on the same images they "
                    "would stay twins: pass views=True, networks without loaded weights, or others (peers=[...]; by "
                    "hand kdtoolkit.models.reinit.reinitialised_copy(net, seed) draws weights anew)"
                )


def name_of(k: int) -> str:
    return PRODUCT if k == 0 else f"peer{k}"


def loss_of(name: str) -> str:
    return "ce" if name == PRODUCT else f"ce/{name}"
