"""BatchNorm statistics of the networks of a run, found again for the weights as they are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdtoolkit.core.run_context import RunContext
from kdtoolkit.data.seeding import derive_seed
from kdtoolkit.utils.state import preserve_random_state

NUM_BATCHES = 16
SEED_STEP = -2  # see RunContext.seed_step: no step of the run has this number


def named_batch_norms(net: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Every BatchNorm of a network that keeps running statistics, with its name.

    Args:
        net: Network to search, itself and its modules at every depth.

    Yields:
        Name in the network, and the module.
    """
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def running_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of a network by name, without the counters.

    Args:
        net: The network.

    Returns:
        "<module>.running_mean" and "<module>.running_var" -> the buffer itself, not a copy, (C,).
    """
    return {
        f"{name}.{key}": module.get_buffer(key)
        for name, module in named_batch_norms(net)
        for key in ("running_mean", "running_var")
    }


@torch.no_grad()
def recalibrate_batch_norms(run: RunContext) -> None:
    """Replace the BatchNorm statistics of all networks by plain means over training batches.

    The batches (16) depend on seed and epoch alone; they are read in train mode. Counters of the
    BatchNorms, random states and the order of the data of the run stay as they were, and so do
    frozen BatchNorms.

    Args:
        run: The run. Its training data must be a data set, not a stream or a user's DataLoader.
    """
    networks = run.method.networks().values()
    norms = [m for net in networks for _, m in named_batch_norms(net) if m.training]
    before = [
        (m, m.momentum, m.num_batches_tracked.clone())
        for m in norms
        if m.num_batches_tracked is not None
    ]
    with preserve_random_state(), run.accelerator.autocast():
        run.seed_step(run.clock.epoch, SEED_STEP)
        split = dataclasses.replace(run.data.train, num_workers=0)
        loader = split.loader(
            run.config.batch_size, shuffle=True, drop_last=True,
            sampling=run.method.batch_sampler if run.method.own_batches else None,
            seed=derive_seed(run.config.seed, run.clock.epoch, SEED_STEP),
        )  # fmt: skip
        for m, _, _ in before:
            m.reset_running_stats()
            m.momentum = None  # PyTorch's sign for a plain mean
        for batch in islice(loader, NUM_BATCHES):
            on_device = {
                key: value.to(run.accelerator.device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            run.method.train_logits(run.prepare_batch(on_device, train=True))
    for m, momentum, counter in before:
        m.momentum = momentum
        if m.num_batches_tracked is not None:
            m.num_batches_tracked.copy_(counter)
