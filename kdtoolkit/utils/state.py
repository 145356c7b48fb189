"""What a call of distill() found in the process, put back when it ends: random states and accelerate's shared state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """A call draws from seeds of its own; the caller's random numbers go on as if there had been none."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        else:  # nothing was drawn there yet: as after the caller's own torch.manual_seed
            torch.cuda.manual_seed_all(torch.initial_seed())


PREPARED = (
    "_models",
    "_optimizers",
    "_schedulers",
    "_dataloaders",
    "_custom_objects",
)  # of an Accelerator


@contextlib.contextmanager
def preserve_accelerate_state(own: Accelerator | None) -> Iterator[None]:
    """accelerate keeps one state per process, which an Accelerator of the caller reads: it is put back. So is `own`,
    which trains without the objects that it had prepared: they are no part of this run's checkpoints."""
    shared = [
        (cls._shared_state, dict(cls._shared_state)) for cls in (AcceleratorState, GradientState)
    ]
    kept = (
        {k: list(v) if isinstance(v, list) else v for k, v in vars(own).items()}
        if own is not None
        else {}
    )
    accumulation = own.gradient_accumulation_steps if own is not None else None
    if own is not None:
        vars(own).update({name: [] for name in PREPARED})
    try:
        yield
    finally:
        for state, before in shared:
            state.clear()
            state.update(before)
        if own is not None:
            own.gradient_accumulation_steps = accumulation
            vars(own).update(kept)
