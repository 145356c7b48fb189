"""Objective, Method, Strategy: one loss between two outputs; the module that owns every trained parameter; a name for
networks that are trained together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Clock, Step


class Method(nn.Module):
    """Owns every trained parameter: `method(batch, clock) -> Step(losses, logits, logs)`, losses weighted.

    The only thing that accelerate prepares. `teachers` are outside of the module tree: no gradient, no checkpoint.

    num_views  augmentations of each training image that it reads
    callbacks  those that are a part of it; the run calls them with the user's, in the order of `Callback.order`
    batch_sampler  (labels (N,) int64, batch size, seed) -> a batch sampler with set_epoch; None draws rows evenly
    uses_unlabelled  whether rows without a label (y = -1) are of use to it
    no_compile_reason why its networks cannot be compiled, None where they can
    networks_per_process  every process trains networks of its own on the whole batch, and gradients are not averaged
    """

    teachers: tuple[Frozen, ...] = ()
    num_views: int = 1
    callbacks: tuple[Callback, ...] = ()
    batch_sampler: Callable[..., Any] | None = None
    uses_unlabelled: bool = False
    no_compile_reason: str | None = None
    networks_per_process: bool = False

    def forward(self, batch: Batch, clock: Clock) -> Step:
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """Every network that is trained, complete, by name."""
        raise NotImplementedError

    def export_candidates(self) -> tuple[list[str], str]:
        """Names of networks one of which a run hands over (the best on the validation split; without one the first),
        and why these."""
        return [next(iter(self.networks()))], "it is the network that was asked for"

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of one network for images in [0, 1], for evaluation."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """For evaluation: logits (B, C) of every network for images in [0, 1], and of ensembles that it trains."""
        return {name: self.logits(name, x) for name in self.networks()}

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        """In training: logits (B, C) of every network for a batch, each on its own view."""
        return {name: self.logits(name, batch["x"]) for name in self.networks()}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that this process trains, by name."""
        return dict(self.named_parameters())

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Where processes train networks of their own: all of them, and what the optimizer knows of them, everywhere.
        All ranks call it before an evaluation and a checkpoint."""

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients share one norm where it is limited: networks that do not know of each other
        have one each."""
        return [list(self.parameters())]

    def place_teachers(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Put the teachers on the device; the engine moves the module itself. Under autocast their BatchNorms are
        folded: its rounding is a thousand times that of folding."""
        for teacher in self.teachers:
            teacher.to(device=device, memory_format=memory_format)
            if autocast is not None:
                teacher.fold(autocast)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        if self.no_compile_reason:
            raise ValueError(f"compile=True: {self.no_compile_reason}; leave compile out")
        raise NotImplementedError

    def release(self) -> None:
        """Take all hooks off, give the teachers back as they were."""

    def plan(self) -> dict[str, Any]:
        """What the plan prints: rows of losses, taps, shapes, adapters; parameter counts."""
        return {}


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
