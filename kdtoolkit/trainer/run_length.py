"""Training batches, the length of a run, and the learning rate over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from kdtoolkit import schedules
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data.dataset import Data
from kdtoolkit.types import Clock


class LoaderAndSchedule(NamedTuple):
    """What a run iterates over.

    Attributes:
        loader: Training batches, not yet prepared by `accelerate`.
        clock: At the start of the run, with its length.
        lr_factor: Number of an optimizer step -> factor of the learning rate.
    """

    loader: DataLoader[Any]
    clock: Clock
    lr_factor: Callable[[int], float]


def make_loader_and_schedule(
    config: TrainerConfig,
    data: Data,
    ranks: int,
    batch_sampler: Callable[..., Any] | None = None,
) -> LoaderAndSchedule:
    """Make the training batches, the clock of the run and its learning rate over time.

    Args:
        config: Numbers of the loop.
        data: The splits.
        ranks: Processes that share a batch.
        batch_sampler: `Method.batch_sampler` of a method that draws rows in its own way.

    Raises:
        ValueError: If the batch size does not divide by processes and accumulation steps, the
            training images do not fill one batch or one optimizer step, or the length of a stream
            is not given.
    """
    parts = config.grad_accum * ranks
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is shared by {ranks} processes and "
            f"{config.grad_accum} accumulation steps and does not divide by {parts}; "
            "batch_size is images per optimizer step over all of them"
        )
    rows = data.train.num_rows
    if rows is not None and data.train.user_loader is None and rows < config.batch_size:
        raise ValueError(
            f"{rows} training images do not fill one batch of {config.batch_size}: "
            "use a smaller batch_size"
        )
    loader = data.train.loader(
        config.batch_size // config.grad_accum,
        shuffle=True,
        drop_last=True,
        sampling=batch_sampler,
        seed=config.seed,
    )
    clock = _make_clock(config, None if rows is None else len(loader))
    lr_factor = schedules.lr_factor(
        config.scheduler,
        -(-clock.total_steps // config.grad_accum),  # optimizer steps, rounded up
        warmup=round(config.warmup_epochs * clock.steps_per_epoch / config.grad_accum),
        milestones=config.milestones,
        gamma=config.gamma,
    )
    return LoaderAndSchedule(loader, clock, lr_factor)


def _make_clock(config: TrainerConfig, batches: int | None) -> Clock:
    """The clock at the start of a run.

    Args:
        config: Numbers of the loop.
        batches: Batches in one pass over the data, None where unknown; the last ones that do not
            fill an optimizer step are left out.
    """
    steps_per_epoch = None
    if batches is not None:
        steps_per_epoch = batches - batches % config.grad_accum
    if steps_per_epoch == 0:
        raise ValueError(
            f"{batches} batches in an epoch do not fill one optimizer step of "
            f"grad_accum={config.grad_accum} batches: lower grad_accum or batch_size"
        )
    if config.max_steps is not None:
        total = config.max_steps * config.grad_accum
        return Clock(steps_per_epoch=steps_per_epoch or total, total_steps=total)
    if steps_per_epoch is None:
        raise ValueError("streamed data has no length: say how long to train with max_steps=...")
    assert config.epochs is not None
    return Clock(steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * config.epochs)
