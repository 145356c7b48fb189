"""Mean losses since the last row and over an epoch, and the first term that was not finite."""

from __future__ import annotations

import time
from typing import TypedDict

import torch
from torch import Tensor

from kdtoolkit.utils import distributed

TermNames = tuple[str, ...]


class WindowState(TypedDict):
    """State of a `LossWindow`, as a checkpoint holds it."""

    sums: list[tuple[list[str], Tensor]]
    count: int
    images: int
    seconds: float


class TrackerState(TypedDict):
    """State of a `LossTracker`, as a checkpoint holds it."""

    interval: WindowState
    epoch: WindowState


class LossWindow:
    """Sums of named losses over some batches, kept on the device.

    A term that a batch does not have counts as 0 there.

    Attributes:
        sums: Names of the terms of a batch -> their sums, (number of terms,) float32. Batches with
            other terms have a vector of their own.
        count: Batches.
        images: Images over all ranks.
    """

    def __init__(self) -> None:
        self.sums: dict[TermNames, Tensor] = {}
        self.count = 0
        self.images = 0
        self._earlier_seconds = 0.0  # before the run was resumed
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the window was opened, those before a resume included."""
        return self._earlier_seconds + time.perf_counter() - self._start

    def add(self, names: TermNames, values: Tensor, images: int) -> None:
        """Add one batch.

        Args:
            names: Names of its loss terms.
            values: Their values, (number of terms,) float32, detached.
            images: Images of the batch over all ranks.
        """
        self.sums[names] = self.sums[names] + values if names in self.sums else values
        self.count += 1
        self.images += images

    def average_over_ranks(self) -> None:
        """Replace the sums by their mean over ranks; all ranks call it.

        One checkpoint file then holds the state of every rank.
        """
        if not distributed.is_distributed():
            return
        ranks = torch.distributed.get_world_size()
        self.sums = {
            names: distributed.all_reduce_sum(value.clone()) / ranks
            for names, value in self.sums.items()
        }

    def to_row(self) -> dict[str, float]:
        """Mean losses per batch and the throughput; all ranks call it.

        Returns:
            `"loss"`, the total; `"loss/<term>"`, each weighted term; `"images_per_s"`.
        """
        self.average_over_ranks()
        terms: dict[str, float] = {}
        for names, sums in self.sums.items():
            for name, total in zip(names, sums.tolist(), strict=True):
                terms[name] = terms.get(name, 0.0) + total / self.count
        row = {"loss": sum(terms.values())}
        row |= {f"loss/{name}": mean for name, mean in terms.items()}
        row["images_per_s"] = self.images / max(self.seconds, 1e-9)
        return row

    def state_dict(self) -> WindowState:
        """Sums (on the CPU), counts and seconds."""
        sums = [(list(names), value.cpu()) for names, value in self.sums.items()]
        return {
            "sums": sums,
            "count": self.count,
            "images": self.images,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: WindowState, device: torch.device) -> None:
        """Continue from a state.

        Args:
            state: What `state_dict` returned.
            device: Where the sums are kept.
        """
        self.sums = {tuple(names): value.to(device) for names, value in state["sums"]}
        self.count, self.images = state["count"], state["images"]
        self._earlier_seconds = state["seconds"]
        self._start = time.perf_counter()


class LossTracker:
    """Means of the losses of a run, and the first step at which a term was not finite.

    Attributes:
        interval: Batches since the last row of losses.
        epoch: Batches of this epoch.
    """

    def __init__(self) -> None:
        self.interval, self.epoch = LossWindow(), LossWindow()
        # first step at which a term was not finite, else -1; (number of terms,) float32
        self._first_bad_step: dict[TermNames, Tensor] = {}

    def add(self, losses: dict[str, Tensor], step: int, images: int) -> None:
        """Add the losses of one batch. It raises nothing and does not wait for the device.

        Args:
            losses: Weighted scalar losses by name.
            step: Number of the batch.
            images: Images of the batch over all ranks.
        """
        names = tuple(losses)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.interval.add(names, values, images)
        self.epoch.add(names, values, images)
        seen = self._first_bad_step.get(names)
        if seen is None:
            seen = torch.full_like(values, -1.0)
        is_first = ~values.isfinite() & (seen < 0)
        self._first_bad_step[names] = torch.where(
            is_first, torch.full_like(values, float(step)), seen
        )

    def first_non_finite(self) -> tuple[int, str] | None:
        """Step and name of the first term that was not finite, or None. It waits for the device."""
        found = [
            (int(step), name)
            for names, steps in self._first_bad_step.items()
            for name, step in zip(names, steps.tolist(), strict=True)
            if step >= 0
        ]
        return min(found) if found else None

    def average_over_ranks(self) -> None:
        """Replace the sums of both windows by their mean over ranks; all ranks call it."""
        self.interval.average_over_ranks()
        self.epoch.average_over_ranks()

    def close_interval(self) -> dict[str, float]:
        """Mean losses since the last row, see `LossWindow.to_row`; a new window is opened."""
        row = self.interval.to_row()
        self.interval = LossWindow()
        return row

    def close_epoch(self) -> dict[str, float]:
        """Mean losses of the epoch, see `LossWindow.to_row`; a new window is opened."""
        row = self.epoch.to_row()
        self.epoch = LossWindow()
        return row

    def state_dict(self) -> TrackerState:
        """State of both windows."""
        return {"interval": self.interval.state_dict(), "epoch": self.epoch.state_dict()}

    def load_state_dict(self, state: TrackerState, device: torch.device) -> None:
        """Continue from a state.

        Args:
            state: What `state_dict` returned.
            device: Where the sums are kept.
        """
        self.interval.load_state_dict(state["interval"], device)
        self.epoch.load_state_dict(state["epoch"], device)
