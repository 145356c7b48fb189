"""Peers: several networks trained in one run; callbacks add what they learn from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow
from kdtoolkit.core.run_context import ExportCandidates
from kdtoolkit.data.sampling import OwnBatches
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.network_checks import (
    check_different_weights,
    check_inputs,
    check_separate_parameters,
    list_networks,
    parameter_shapes,
)
from kdtoolkit.methods.network_placement import NetworkPlacement
from kdtoolkit.methods.teacher_losses import LossBuilder, TeacherLosses, term_of
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step
from kdtoolkit.utils import distributed
from kdtoolkit.utils.validation import check_choice, check_flag, check_number

FIRST = "student"
BATCHES = ("shared", "own")


class Peers(Method):
    """Networks of one or several architectures, each with its own weights, normalisation and size.

    Its losses are "ce" of the student and "ce/peer1", ... of the others. Without a callback between
    them every network trains as it would alone, to the last digit. Of networks of one architecture
    the best on the validation split is exported, of several the first.

    Args:
        networks: Networks that map images (B, 3, H, W) to logits (B, C), one or more. They are
            named "student", "peer1", "peer2", ...
        weight: Weight of every cross-entropy, a number or a schedule.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        image: Height and width of the data in pixels, where a network's own size is fixed and
            differs.
        spread: Over P processes, True trains networks k, k + P, ... on process k, each on the whole
            batch, and exchanges logits after every forward pass: bit for bit what one process does,
            at the cost of one network each. False trains all on every process, each on its share of
            the batch. "auto" spreads where P divides the number of networks.
        batches: "shared": all networks see the same images in a step. "own": every network draws
            images of its own, as many as the batch size, and runs through the training rows in an
            order of its own. Losses between networks need the same images.
        unlabelled: Whether rows without a label (-1) are taken: they count in the batch size that a
            cross-entropy is divided by, and add nothing to it.

    Raises:
        ValueError: Without a network, for networks that share parameters, or for equal networks
            that see the same images and so would stay equal; for views and batches of their own at
            once.

    Example:
        >>> networks = [timm.create_model("resnet18", num_classes=10) for _ in range(2)]
        >>> result = distill(None, None, "digits", method=Peers(networks), callbacks=[MutualKL()])
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
        batches: str = "shared",
        unlabelled: bool = False,
    ) -> None:
        super().__init__()
        check_inputs("Peers", None, image)
        networks = list_networks("Peers", networks)
        if not networks:
            raise ValueError("Peers([]): give at least one network")
        check_separate_parameters(networks)
        check_flag("views", views)
        check_flag("unlabelled", unlabelled)
        check_choice("batches", batches, BATCHES)
        if views and batches == "own":
            raise ValueError(
                "views=True has no effect with batches='own', which gives every network other "
                "images: leave one of them out"
            )
        check_choice("spread", spread, (True, False, "auto"))
        check_loss_weight(weight)
        if not views and batches == "shared":
            check_different_weights(networks)
        check_number("label_smoothing", label_smoothing, minimum=0, below=1)
        self.peers = nn.ModuleDict({name_of(k): net for k, net in enumerate(networks)})
        self.weight, self.label_smoothing = weight, label_smoothing
        self.placement = NetworkPlacement(len(networks), spread)
        self.teacher_losses = TeacherLosses()
        self.image = image
        self.num_views = len(networks) if views else 1
        self.own_batches = batches == "own"
        if self.own_batches:
            self.batch_sampler = OwnBatches(len(networks))
        self.notes: list[str] = []
        self.uses_unlabelled = bool(unlabelled)
        self.preprocess = {
            name: Preprocess.from_model(net, image) for name, net in self.networks().items()
        }

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Let every network learn from frozen teachers, too, on the images that it sees itself.

        Args:
            teachers: The frozen teachers.
            build: Builds the losses between one network and the teachers.
        """
        taps = {
            name: Taps(net, None, self.preprocess[name].size or self.image)
            for name, net in self.networks().items()
        }
        self.teachers = tuple(teachers)
        self.teacher_losses = TeacherLosses(taps, teachers, build)
        self.teacher_losses.select_teacher_taps()
        for name, tapped in taps.items():
            tapped.select(self.teacher_losses.student_taps(name))
            tapped.check_training_forward()

    # -------------------------------------------------------------------------------- training
    def forward(self, batch: Batch, clock: Clock) -> Step:
        """Cross-entropy of every network, and what it learns from teachers."""
        batches = {name: self._batch_of(k, batch) for k, name in enumerate(self.peers)}
        outs = self._run_networks(batches)
        logits = self._gather({name: out.logits for name, out in outs.items()})
        weight = weight_at(self.weight, clock, "ce")
        losses = {
            loss_of(name): weight * self._ce(z, batches[name]["y"]) for name, z in logits.items()
        }
        return Step(losses | self._teacher_terms(outs, batches, clock), logits)

    def _teacher_terms(
        self, outs: Mapping[str, Out], batches: Mapping[str, Batch], clock: Clock
    ) -> dict[str, Tensor]:
        """The terms of all networks; those of other processes' networks without gradient."""
        keys = list(self.teacher_losses.weights)
        terms: dict[str, Tensor] = self.teacher_losses(outs, batches, clock)
        if not keys or not self.placement.is_spread:
            return terms
        own = {n: torch.stack([terms[term_of(k, n)].float() for k in keys]) for n in outs}
        return {
            term_of(key, name): value
            for name, values in self._gather(own).items()
            for key, value in zip(keys, values, strict=True)
        }

    def _ce(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.uses_unlabelled:
            return functional.ce(logits, labels, label_smoothing=self.label_smoothing)
        return functional.ce_partly_labelled(logits, labels, label_smoothing=self.label_smoothing)

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, C) of every network in training, each on its own view or batch.

        Args:
            batch: Images, with views where every network has its own; with batches of their own
                those of all networks, image i for network i modulo their number.

        Returns:
            Logits in the order of the networks, each computed from the same random state; those of
            other processes' networks without gradient.
        """
        batches = {name: self._batch_of(k, batch) for k, name in enumerate(self.peers)}
        outs = self._run_networks(batches)
        return self._gather({name: out.logits for name, out in outs.items()})

    def _run_networks(self, batches: Mapping[str, Batch]) -> dict[str, Out]:
        """What every network of this process gives for its images."""
        seed = torch.initial_seed()
        outs: dict[str, Out] = {}
        for k, name in enumerate(self.peers):
            if self.placement.is_local(k):
                torch.manual_seed(seed)  # dropout as if the network were alone
                outs[name] = self._run(name, batches[name]["x"])
        return outs

    def _run(self, name: str, x: Tensor) -> Out:
        taps = self.teacher_losses.taps.get(name)
        return Out(self.logits(name, x), {}) if taps is None else taps(self.preprocess[name](x))

    def _batch_of(self, k: int, batch: Batch) -> Batch:
        """What network k sees: its own rows, its own view, or the whole batch."""
        if self.own_batches:
            found = batch.copy()
            for name in ("x", "y", "index"):
                if name in batch:
                    found[name] = batch[name][k :: len(self.peers)]  # type: ignore[literal-required]
            return found
        return batch if self.num_views == 1 else batch | {"x": batch["views"][:, k]}

    def _gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.placement.gather_logits(local, list(self.peers))

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """One group for each network of this process."""
        names = [name for k, name in enumerate(self.peers) if self.placement.is_local(k)]
        return [[p for part in self._parts_of(name) for p in part.parameters()] for name in names]

    def _parts_of(self, name: str) -> list[nn.Module]:
        """A network, and the losses with its adapters."""
        losses = [self.teacher_losses[name]] if name in self.teacher_losses else []
        return [self.peers[name], *losses]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every network."""
        for name, net in self.peers.items():
            taps = self.teacher_losses.taps.get(name)
            if taps is None:
                net.compile()
            else:
                taps.compile()
        for teacher in self.teachers:
            teacher.compile()

    def release(self) -> None:
        """Remove all hooks, and give the teachers back as they were."""
        self.teacher_losses.release()
        super().release()

    # ------------------------------------------------------------------------------ evaluation
    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return {"ce": self.weight, **self.teacher_losses.weights}

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name: "student", "peer1", ..."""
        return dict(self.peers)

    def export_candidates(self) -> ExportCandidates:
        """All networks where they have one architecture, else the first."""
        first, *others = (parameter_shapes(net) for net in self.peers.values())
        if others and all(list(shapes.items()) == list(first.items()) for shapes in others):
            return list(self.peers), "its peers have the same architecture"
        return super().export_candidates()

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of one network for images in [0, 1]."""
        network = self.peers[name]
        return check_logits(network, network(self.preprocess[name](x)))

    def plan(self) -> MethodPlan:
        """One row of losses for each network, its parameters, and where it is trained."""
        weight = describe_weight(self.weight)
        rows = [
            PlanRow(loss=loss_of(name), student=f"{name} logits", weight=weight, teacher="labels")
            for name in self.peers
        ]
        counts = {name: num_parameters(net) for name, net in self.peers.items()}
        rows += self.teacher_losses.plan_rows()
        counts |= self.teacher_losses.parameter_counts()
        return {"losses": rows, "parameters": counts, "notes": self._plan_notes()}

    def _plan_notes(self) -> list[str]:
        own = (
            f"every step reads {len(self.peers)} batches, one for each network, which draws its "
            "own images"
        )
        return [*self.notes, *([own] if self.own_batches else []), *self._placement_notes()]

    def _placement_notes(self) -> list[str]:
        processes = distributed.world_size()
        if processes == 1:
            return []
        if self.placement.is_spread:
            return [
                f"the networks are spread over {processes} processes, each trains its own on the "
                "whole batch"
            ]
        return [
            f"every one of {processes} processes trains all networks, each on its share of the "
            "batch"
        ]

    # ------------------------------------------------------------------- several processes
    def place_teachers(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Check that the networks can be spread over the processes of the run."""
        super().place_teachers(device, memory_format, autocast)
        self.placement.check()

    @property
    def networks_per_process(self) -> bool:  # type: ignore[override]
        """Whether every process trains networks of its own."""
        return self.placement.is_spread

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of this process's networks."""
        local = {name for k, name in enumerate(self.peers) if self.placement.is_local(k)}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.split(".")[1] in local  # "peers.<network>...", "teacher_losses.<network>..."
        }

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Broadcast every network, and its optimizer state, from the process that trains it.

        Args:
            optimizer: The optimizer whose state is exchanged; None exchanges networks alone.
        """
        if not self.networks_per_process:
            return
        for k, name in enumerate(self.peers):
            source, parts = self.placement.process_of(k), self._parts_of(name)
            parameters = [p for part in parts for p in part.parameters()]
            buffers = [b for part in parts for b in part.buffers()]
            distributed.broadcast_parameters(source, [*parameters, *buffers])
            if optimizer is not None:
                distributed.broadcast_optimizer_state(source, optimizer, parameters)


def name_of(k: int) -> str:
    """Name of network k: "student", "peer1", ...

    Args:
        k: Number of the network, from 0.

    Returns:
        The name; network 0 is the student.
    """
    return FIRST if k == 0 else f"peer{k}"


def loss_of(name: str) -> str:
    """Name of a network's cross-entropy: "ce" of the student, "ce/peer1", ...

    Args:
        name: Name of the network.

    Returns:
        Name of the loss.
    """
    return "ce" if name == FIRST else f"ce/{name}"
