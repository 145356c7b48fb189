"""First weights of an EMA teacher: those of DKEL's decoupled, initialised teacher.

Shao, Chen 2023, "Decoupled Knowledge with Ensemble Learning for Online Distillation".
"""

from __future__ import annotations

import torch

from kdtoolkit import functional
from kdtoolkit.core.method import Method
from kdtoolkit.core.run_context import RunContext
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.utils import distributed

# Differs the seed of a teacher's first weights and dropout from that of the students'.
SEED_OFFSET = 0x5EED


def reinitialise(teacher: Method, seed: int) -> None:
    """Give every network of a teacher first weights of its own.

    Args:
        teacher: The copy of the method that is averaged.
        seed: Seed of the run.
    """
    for k, net in enumerate(teacher.networks().values()):
        own = reinitialised_copy(net, (seed ^ SEED_OFFSET) + k)
        net.load_state_dict(own.state_dict())


def train_first_steps(teacher: Method, run: RunContext, num_steps: int, lr: float | None) -> None:
    """Train a teacher by plain SGD on the mean cross-entropy of its networks.

    It reads the first batches of the run, which the run will read again.

    Args:
        teacher: The copy of the method that is averaged.
        run: The run.
        num_steps: Number of steps; 0 does nothing.
        lr: Learning rate; None is a hundredth of that of the run.
    """
    if not num_steps:
        return
    trained = [p for p in teacher.trainable_parameters().values() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=run.config.lr / 100 if lr is None else lr,
        weight_decay=run.config.weight_decay,
    )
    teacher.train()
    with run.first_batches(num_steps) as batches:
        for number, raw in enumerate(batches):
            run.seed_step(0, number)
            logits = teacher.train_logits(run.prepare_batch(raw, train=True)).values()
            labels = raw["y"]
            labelled = labels >= 0  # rows without a label have -1
            losses = [functional.ce(z[labelled], labels[labelled]) for z in logits]
            torch.autograd.backward(torch.stack(losses).mean())
            if not teacher.networks_per_process:
                _average_gradients(trained)
            optimizer.step()
            optimizer.zero_grad()


def _average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        if p.grad is not None:
            distributed.all_reduce_sum(p.grad).div_(distributed.world_size())
