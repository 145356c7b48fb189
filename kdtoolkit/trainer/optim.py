"""What the numbers of a run make: its loader, clock, optimizer and learning rate over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.utils.data import DataLoader

from kdtoolkit import schedules
from kdtoolkit.core.config import PAPER_OPTIMIZERS, TrainerConfig
from kdtoolkit.data.dataset import Data
from kdtoolkit.models.layer_groups import layer_decay_groups
from kdtoolkit.types import Clock
from kdtoolkit.utils.registry import suggestion


def make_loader_and_schedule(
    s: TrainerConfig, data: Data, ranks: int, sampling: Callable[..., Any] | None = None
) -> tuple[DataLoader, Clock, Callable[[int], float]]:
    """Training batches, how many of them, and the learning-rate factor of optimizer step n.

    sampling  of a Method that draws its rows in its own way
    """
    if s.batch_size % (s.grad_accum * ranks):
        raise ValueError(
            f"batch_size {s.batch_size} is shared by {ranks} processes and {s.grad_accum} accumulation steps and "
            f"does not divide by {s.grad_accum * ranks}; batch_size is images per optimizer step over all of them"
        )
    rows = data.train.len
    if rows is not None and data.train.own_loader is None and rows < s.batch_size:
        raise ValueError(
            f"{rows} training images do not fill one batch of {s.batch_size}: use a smaller batch_size"
        )
    loader = data.train.loader(
        s.batch_size // s.grad_accum, shuffle=True, drop_last=True, sampling=sampling, seed=s.seed
    )
    clock = _clock(s, None if rows is None else len(loader))
    updates = -(-clock.total_steps // s.grad_accum)
    warmup = round(s.warmup_epochs * clock.steps_per_epoch / s.grad_accum)
    factor = schedules.lr_factor(
        s.scheduler, updates, warmup=warmup, milestones=s.milestones, gamma=s.gamma
    )
    return loader, clock, factor


def make_optimizer(
    method: nn.Module, s: TrainerConfig, layers: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """timm's optimizers by name. "sgd" is plain momentum and "nesterov" Nesterov's, both with decay on every parameter
    as in the papers; every other name is timm's, without decay on biases and norms.

    layers  parameter of the first network -> layer, as tuning.layer_numbers() gives it; needed for s.layer_decay
    """
    filtered = s.optimizer not in PAPER_OPTIMIZERS
    given: dict[str, Any] = {"momentum": s.momentum, "lr": s.lr, "weight_decay": s.weight_decay}
    groups: Any = method
    if s.layer_decay is not None:
        if layers is None:
            raise ValueError(
                f"layer_decay={s.layer_decay} needs the layers of the network: tuning.layer_numbers(taps)"
            )
        net = next(iter(method.networks().values()))  # type: ignore[operator]
        same = {"lr": s.lr, "weight_decay": s.weight_decay, "decay": s.layer_decay}
        groups = layer_decay_groups(method, net, layers, filtered=filtered, **same)
    try:
        return create_optimizer_v2(
            groups,
            opt=PAPER_OPTIMIZERS.get(s.optimizer, s.optimizer),
            filter_bias_and_bn=filtered,
            **given,
        )
    except (AssertionError, KeyError, ValueError) as error:
        known = list(map(str, list_optimizers()))
        if str(s.optimizer).lower().removeprefix("lookahead_") in [*PAPER_OPTIMIZERS, *known]:
            raise ValueError(
                f"optimizer={s.optimizer!r}, lr={s.lr}, weight_decay={s.weight_decay}: {error}"
            ) from error
        raise ValueError(
            f"optimizer={s.optimizer!r}: {error}; allowed are 'sgd', 'nesterov' and the names of "
            f"timm.optim.list_optimizers(){suggestion(str(s.optimizer), known)}"
        ) from error


def _clock(s: TrainerConfig, batches: int | None) -> Clock:
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
