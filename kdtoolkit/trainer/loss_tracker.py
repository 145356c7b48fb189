"""What a run keeps of its losses: means since the last row and of the epoch, and whether every term is finite."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from kdtoolkit.utils import distributed


class NonFiniteLoss(RuntimeError):
    """A loss term or a weight became nan or infinite."""


class LossWindow:
    """Sums of named losses over batches, on the device. A term that a batch does not have counts as 0 there."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.count, self.images, self.seconds, self.since = 0, 0, 0.0, time.perf_counter()

    def add(self, names: tuple[str, ...], values: Tensor, images: int) -> None:
        self.sums[names] = self.sums[names] + values if names in self.sums else values
        self.count += 1
        self.images += images

    def share(self) -> None:
        """The mean over ranks on every rank, so that one file holds the state of all."""
        if distributed.is_distributed():
            ranks = torch.distributed.get_world_size()
            self.sums = {
                names: distributed.all_reduce_sum(value.clone()) / ranks
                for names, value in self.sums.items()
            }

    def row(self) -> dict[str, float]:
        """Total, terms (weighted) and images per second."""
        self.share()
        terms: dict[str, float] = {}
        for names, value in self.sums.items():
            for name, total in zip(names, value.tolist(), strict=True):
                terms[name] = terms.get(name, 0.0) + total / self.count
        seconds = self.seconds + time.perf_counter() - self.since
        row = {"loss": sum(terms.values())} | {f"loss/{name}": mean for name, mean in terms.items()}
        return row | {"images_per_s": self.images / max(seconds, 1e-9)}

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.perf_counter() - self.since
        sums = [(list(names), value.cpu()) for names, value in self.sums.items()]
        return {"sums": sums, "count": self.count, "images": self.images, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {tuple(names): value.to(device) for names, value in state["sums"]}
        self.count, self.images, self.seconds = state["count"], state["images"], state["seconds"]
        self.since = time.perf_counter()


class LossTracker:
    """Both windows of a run, and the first step at which a term was not finite."""

    def __init__(self) -> None:
        self.interval, self.epoch = LossWindow(), LossWindow()
        self._bad: dict[tuple[str, ...], Tensor] = {}

    def add(self, losses: dict[str, Tensor], step: int, images: int) -> None:
        """images: over all ranks. Raises nothing and does not wait for the device."""
        names, values = tuple(losses), torch.stack([v.detach().float() for v in losses.values()])
        for window in (self.interval, self.epoch):
            window.add(names, values, images)
        seen = self._bad.get(names)
        seen = torch.full_like(values, -1.0) if seen is None else seen
        self._bad[names] = torch.where(
            ~values.isfinite() & (seen < 0), torch.full_like(values, float(step)), seen
        )

    def broken(self) -> tuple[int, str] | None:
        """(step, name) of the first term that was not finite."""
        found = [
            (int(step), name)
            for names, steps in self._bad.items()
            for name, step in zip(names, steps.tolist(), strict=True)
            if step >= 0
        ]
        return min(found) if found else None

    def close(self, window: str) -> dict[str, float]:
        """The row of "interval" or "epoch", which starts anew."""
        row = getattr(self, window).row()
        setattr(self, window, LossWindow())
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"interval": self.interval.state_dict(), "epoch": self.epoch.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.interval.load_state_dict(state["interval"], device)
        self.epoch.load_state_dict(state["epoch"], device)
