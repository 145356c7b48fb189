"""The numbers of a run, and what they make: the loader, the clock, the optimizer and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.utils.data import DataLoader

from . import schedules
from .data import Data
from .registry import nearest
from .types import Clock


@dataclass(frozen=True)
class Settings:
    """Numbers of a run. Lengths in epochs or optimizer steps, `batch_size` images per optimizer step over all ranks."""

    epochs: int | None = 10
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"  # momentum 0.9 without Nesterov, decay on every parameter, as in the papers
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    scheduler: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)  # shares of the run, for "multistep"
    warmup_epochs: float = 0.0
    grad_accum: int = 1
    grad_clip: float | None = None  # largest norm of the gradient
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50  # batches
    eval_every: int = 1  # epochs
    monitor: str | None = "val"  # split that chooses the best epoch; None takes the last
    eval_test: str = "auto"  # "every" epoch or at the "end"; "auto" is "end" where a validation split chooses

    def __post_init__(self) -> None:
        for name, most in (("lr", math.inf), ("weight_decay", math.inf), ("warmup_epochs", math.inf), ("momentum", 1)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{name} is {number!r}, a {type(number).__name__}; it must be a number")
            if not 0 <= number < most:
                allowed = "from 0 to below 1" if most == 1 else "a finite number from 0"
                raise ValueError(f"{name} is {number!r}; allowed: {allowed}")


def schedule(s: Settings, data: Data, ranks: int) -> tuple[DataLoader, Clock, Callable[[int], float]]:
    """Training batches, how many of them, and the learning-rate factor of optimizer step n."""
    if s.batch_size % (s.grad_accum * ranks):
        raise ValueError(
            f"batch_size {s.batch_size} is shared by {ranks} processes and {s.grad_accum} accumulation steps and "
            f"does not divide by {s.grad_accum * ranks}; batch_size is images per optimizer step over all of them"
        )
    rows = data.train.len
    if rows is not None and data.train.own_loader is None and rows < s.batch_size:
        raise ValueError(f"{rows} training images do not fill one batch of {s.batch_size}: use a smaller batch_size")
    loader = data.train.loader(s.batch_size // s.grad_accum, shuffle=True, drop_last=True)
    clock = _clock(s, None if rows is None else len(loader))
    updates = -(-clock.total_steps // s.grad_accum)
    warmup = round(s.warmup_epochs * clock.steps_per_epoch / s.grad_accum)
    return loader, clock, schedules.lr_factor(s.scheduler, updates, warmup=warmup, milestones=s.milestones)


def make_optimizer(method: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """timm's optimizers by name. "sgd" is plain momentum and "nesterov" Nesterov's, both with decay on every parameter
    as in the papers; every other name is timm's, without decay on biases and norms."""
    plain = {"sgd": "momentum", "momentum": "momentum", "nesterov": "nesterov"}
    try:
        return create_optimizer_v2(
            method,
            opt=plain.get(s.optimizer, s.optimizer),
            lr=s.lr,
            weight_decay=s.weight_decay,
            momentum=s.momentum,
            filter_bias_and_bn=s.optimizer not in plain,
        )
    except (AssertionError, KeyError, ValueError) as error:
        known = list(map(str, list_optimizers()))
        if str(s.optimizer).lower().removeprefix("lookahead_") in [*plain, *known]:
            raise ValueError(f"optimizer={s.optimizer!r}, lr={s.lr}, weight_decay={s.weight_decay}: {error}") from error
        raise ValueError(
            f"optimizer={s.optimizer!r}: {error}; allowed are 'sgd', 'nesterov' and the names of "
            f"timm.optim.list_optimizers(){nearest(str(s.optimizer), known)}"
        ) from error


def _clock(s: Settings, batches: int | None) -> Clock:
    """`batches` of one pass; those that do not fill an optimizer step are left out."""
    per_epoch = None if batches is None else batches // s.grad_accum * s.grad_accum
    if per_epoch == 0:
        raise ValueError(
            f"{batches} batches in an epoch do not fill one optimizer step of grad_accum={s.grad_accum} batches"
        )
    if s.max_steps is not None:
        total = s.max_steps * s.grad_accum
        return Clock(steps_per_epoch=per_epoch or total, total_steps=total)
    if per_epoch is None:
        raise ValueError("streamed data has no length: say how long to train with max_steps=...")
    assert s.epochs is not None
    return Clock(steps_per_epoch=per_epoch, total_steps=per_epoch * s.epochs)
