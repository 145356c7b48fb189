"""What a callback may use of a run, and what is known of a run before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.types import Batch, Clock

if TYPE_CHECKING:
    from kdtoolkit.core.callback import Callback
    from kdtoolkit.core.method import Method
    from kdtoolkit.metrics.chance import ChanceLevel

MetricsRow = dict[str, Any]  # one line of metrics.jsonl: "event", "epoch", "step" and plain values
RawBatch = Mapping[str, Tensor]  # what a data loader gives, before augmentation
ExportCandidates = tuple[list[str], str]  # names of networks, and the reason for these


class MetricsWriter(Protocol):
    """The rows of `metrics.jsonl`.

    Attributes:
        rows: All rows so far, the first row first.
    """

    rows: list[MetricsRow]

    def add(self, **row: Any) -> MetricsRow:
        """Append one row, and write it where the run has a folder.

        Args:
            **row: "event", "epoch", "step" and further plain values.

        Returns:
            The row as it was written.
        """
        ...


@dataclass
class RunPreview:
    """What is known of a run before anything is written; `Callback.check` gets it.

    Attributes:
        method: The method that will be trained.
        data: Its data; None in a dry run of a named data set.
        config: Numbers of the training loop.
        callbacks: All callbacks of the run, in their order.
    """

    method: Method
    data: Data | None
    config: TrainerConfig
    callbacks: list[Callback]

    @property
    def clock(self) -> Clock | None:
        """The clock at the start of the run; None where its length is not known yet.

        That is so in a dry run of a named data set, for a stream, for a loader of unknown length,
        and for a method that draws rows in its own way.
        """
        if self.data is None or self.method.batch_sampler is not None:
            return None
        config, train = self.config, self.data.train
        batches = None if train.num_rows is None else train.num_rows // config.batch_size
        if batches is not None:
            batches *= config.grad_accum
        if train.user_loader is not None:
            batches = len(train.user_loader) if isinstance(train.user_loader, Sized) else None
            batches = None if batches is None else batches - batches % config.grad_accum
        if config.max_steps is not None:
            total = config.max_steps * config.grad_accum
            return Clock(steps_per_epoch=batches or total, total_steps=total)
        if not batches or config.epochs is None:
            return None
        return Clock(steps_per_epoch=batches, total_steps=batches * config.epochs)


class RunContext(Protocol):
    """What a callback may use of a run.

    The trainer is one; write your own to use the callbacks in a training loop of your own.

    Attributes:
        method: The method, bare (without what `accelerate` wraps around it).
        data: Training, validation and test splits.
        config: Numbers of the training loop.
        accelerator: The `accelerate.Accelerator` of the run.
        clock: Step and epoch, and how many there are.
        callbacks: All callbacks of the run, in their order.
        optimizer: The prepared optimizer.
        output_dir: Folder of the run; None where nothing is written.
        best: `{"epoch", "step", "top1", "network"}` of the best evaluation; empty before the first.
        stop: Set a reason to end the run after this step.
        epoch_start: Step at which this epoch began.
    """

    method: Method
    data: Data
    config: TrainerConfig
    accelerator: Accelerator
    clock: Clock
    callbacks: list[Callback]
    optimizer: torch.optim.Optimizer
    output_dir: Path | None
    best: dict[str, Any]
    stop: str | None
    epoch_start: int

    @property
    def metrics_log(self) -> MetricsWriter:
        """The rows of `metrics.jsonl`."""
        ...

    @property
    def teacher_metrics(self) -> dict[str, dict[str, float]]:
        """`{"teacher/<split>": {"top1": ...}}`, accuracies in percent."""
        ...

    @property
    def teacher_chance(self) -> dict[str, ChanceLevel]:
        """`{"teacher/<split>": ...}`: what answers reach that do not depend on the image."""
        ...

    def export_candidates(self) -> ExportCandidates:
        """Names of the networks one of which is exported, and the reason for these."""
        ...

    def save(self, name: str = "last") -> Path | None:
        """Write `checkpoints/<name>`; every rank calls it.

        Args:
            name: Name of the folder in `checkpoints/`.

        Returns:
            The folder; None where the run has no `output_dir`.
        """
        ...

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Exchange networks that processes train on their own; every rank calls it.

        Args:
            optimizer: Its state is exchanged too; None exchanges networks only.
        """
        ...

    def check_finite(self, weights: bool = False) -> None:
        """Check that every loss was finite.

        Args:
            weights: Check the weights of the method, too.

        Raises:
            NonFiniteLoss: If a loss, or a weight, is not finite.
        """
        ...

    def seed_step(self, epoch: int, step: int) -> None:
        """Seed dropout and other random draws of one step.

        Args:
            epoch: Number of the epoch, from 0.
            step: Number of the step, from 0. For draws outside of a step use -3 and below: the
                trainer uses -1 and the recalibration of BatchNorms -2.
        """
        ...

    def prepare_batch(self, batch: Any, train: bool) -> Batch:
        """Augment a raw batch and lay it out in memory as the networks expect it.

        Args:
            batch: A batch of a data loader, on the training device.
            train: Whether it is augmented.
        """
        ...

    def first_batches(self, count: int) -> AbstractContextManager[Iterator[Any]]:
        """The first raw batches of the run, which it will read again.

        Args:
            count: How many.
        """
        ...

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        """This rank's batches of a split, for evaluation.

        Args:
            split: One of the splits of `data`.
        """
        ...


def last_step_of_epoch(run: RunContext) -> int:
    """Value of `run.clock.step` at the end of the epoch that is running.

    Args:
        run: The run.

    Returns:
        Step, counted from the start of the run; at most its `clock.total_steps`.
    """
    return min(run.clock.total_steps, run.epoch_start + run.clock.steps_per_epoch)
