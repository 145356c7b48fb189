"""Everything that `accelerate` prepares: model, optimizer, training batches and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.method import Method
from kdtoolkit.data.dataset import Data
from kdtoolkit.trainer.optim import make_optimizer
from kdtoolkit.trainer.run_length import make_loader_and_schedule
from kdtoolkit.types import Clock
from kdtoolkit.utils.memory import keep_freed_memory

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PreparedObjects(NamedTuple):
    """What the loop works with. All but the clock are wrapped by `accelerate`.

    Attributes:
        net: The method.
        optimizer: Its optimizer.
        scheduler: Learning rate over time.
        loader: Training batches, on the device.
        clock: At the start of the run.
    """

    net: Any
    optimizer: Any
    scheduler: Any
    loader: Any
    clock: Clock


def prepare_training(
    method: Method,
    data: Data,
    config: TrainerConfig,
    accelerator: Accelerator,
    layers: Mapping[str, int] | None = None,
) -> PreparedObjects:
    """Move the method and its teachers to the device, make optimizer and batches, and prepare them.

    Args:
        method: The method, which is changed in place.
        data: The splits.
        config: Numbers of the loop.
        accelerator: Prepares the objects.
        layers: Parameter of the first network -> layer, for `config.layer_decay`.
    """
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    autocast = AUTOCAST_TYPES.get(str(accelerator.mixed_precision))
    method.place_teachers(accelerator.device, memory_format, autocast)
    ranks = 1 if method.networks_per_process else accelerator.num_processes
    loader, clock, lr_factor = make_loader_and_schedule(config, data, ranks, method.batch_sampler)
    method.to(device=accelerator.device)
    method.to(memory_format=memory_format)  # type: ignore[call-overload]
    if config.compile:
        method.compile()
    optimizer = make_optimizer(method, config, layers)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    if method.networks_per_process:  # gradients are not averaged, batches are not shared
        net = accelerator.prepare_model(method, evaluation_mode=True)
        batches = _prepare_whole_batches(loader, accelerator, config.seed)
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
        return PreparedObjects(net, optimizer, scheduler, batches, clock)
    net, optimizer, batches, scheduler = accelerator.prepare(method, optimizer, loader, scheduler)
    return PreparedObjects(net, optimizer, scheduler, batches, clock)


def _prepare_whole_batches(loader: DataLoader[Any], accelerator: Accelerator, seed: int) -> Any:
    """Batches on the device, every process getting the whole of each."""
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        split_batches=True,
        put_on_device=True,
        use_seedable_sampler=True,
        non_blocking=True,
        data_seed=seed,
    )


def describe_for_checkpoint(method: Method, config: TrainerConfig, clock: Clock) -> dict[str, Any]:
    """Settings of the loop that a checkpoint must share with the run that resumes it.

    Args:
        method: Its networks are named.
        config: Numbers of the loop.
        clock: Holds the length of the run.

    Returns:
        Plain values by name.
    """
    return {
        "seed": config.seed,
        "total_steps": clock.total_steps,
        "batch_size": config.batch_size,
        "optimizer": _describe_optimizer(config),
        "networks": {name: type(net).__name__ for name, net in method.networks().items()},
    }


def _describe_optimizer(config: TrainerConfig) -> str:
    text = f"{config.optimizer} lr={config.lr} wd={config.weight_decay} {config.scheduler}"
    if config.layer_decay is not None:
        text += f" layer_decay={config.layer_decay}"
    if config.grad_accum > 1:
        text += f" grad_accum={config.grad_accum}"
    return text
