"""State of the process that distill() restores at its end: random states, accelerate's state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

# What an Accelerator keeps of the objects that it prepared or that were registered with it.
PREPARED = ("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects")


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Context after which the random numbers of Python, NumPy and torch continue as before it.

    Where nothing was drawn on CUDA before, it is seeded as after the caller's own
    `torch.manual_seed`.
    """
    drawn_on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if drawn_on_cuda else None
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        else:
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextlib.contextmanager
def preserve_accelerate_state(accelerator: Accelerator | None) -> Iterator[None]:
    """Context after which accelerate's state is what it was before.

    accelerate keeps one state per process, which an Accelerator of the caller reads. In the context
    the caller's Accelerator has no prepared objects: they are no part of this run's checkpoints.

    Args:
        accelerator: The caller's own, whose attributes are restored too; None where there is none.
    """
    shared = [
        (cls._shared_state, dict(cls._shared_state)) for cls in (AcceleratorState, GradientState)
    ]
    with _preserve_accelerator(accelerator):
        try:
            yield
        finally:
            for state, before in shared:
                state.clear()
                state.update(before)


@contextlib.contextmanager
def _preserve_accelerator(accelerator: Accelerator | None) -> Iterator[None]:
    if accelerator is None:
        yield
        return
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(accelerator).items()}
    accumulation = accelerator.gradient_accumulation_steps
    vars(accelerator).update({name: [] for name in PREPARED})
    try:
        yield
    finally:
        accelerator.gradient_accumulation_steps = accumulation
        vars(accelerator).update(before)
