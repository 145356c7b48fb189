"""Random numbers that depend on a seed, an epoch and a row alone.

They do not depend on the order or the composition of a batch, nor on workers, ranks or the device.
All arithmetic is on integers, so CPU and CUDA give the same bits.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
MASK_64 = (1 << 64) - 1
RANDOM_BITS = 24  # random bits per number: what a float32 in [0, 1) holds exactly
# Multipliers of lowbias32 (Wellons 2018); the second less 2**32, so that int64 cannot overflow.
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B - (1 << 32)

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def mix_bits(value: IntOrTensor) -> IntOrTensor:
    """Finaliser of a 32-bit hash (lowbias32, Wellons 2018), a bijection of 0 .. 2**32 - 1.

    Args:
        value: A Python int or an int64 tensor, 0 to 2**32 - 1.

    Returns:
        The mixed value, of the same kind and range; both kinds give the same bits.
    """
    value = ((value ^ (value >> 16)) * MULTIPLIER_1) & MASK_32
    value = ((value ^ (value >> 15)) * MULTIPLIER_2) & MASK_32
    return value ^ (value >> 16)


def derive_seed(*parts: int) -> int:
    """Fold any number of integers into one seed.

    Args:
        parts: Integers of any sign; the lowest 64 bits of each count.

    Returns:
        A seed of 32 bits, 0 to 2**32 - 1.
    """
    state = 0x9E3779B9
    for part in parts:
        bits = int(part) & MASK_64
        state = mix_bits((state + (bits & MASK_32)) & MASK_32)
        state = mix_bits((state + (bits >> 32) + 0x632BE5AB) & MASK_32)
    return state


def hash_bits(seed: int, epoch: int, index: Tensor, streams: Sequence[int]) -> Tensor:
    """Draw uniform integers for every sample, one per stream.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        index: Rows, (B,) int64.
        streams: Numbers of S independent draws.

    Returns:
        (S, B) int64, uniform over 0 .. 2**24 - 1, on the device of `index`.
    """
    low_seeds = [derive_seed(seed, epoch, stream, 1) for stream in streams]
    high_seeds = [derive_seed(seed, epoch, stream, 2) for stream in streams]
    low = torch.tensor(low_seeds, device=index.device)[:, None]  # (S, 1)
    high = torch.tensor(high_seeds, device=index.device)[:, None]
    state = mix_bits((index & MASK_32) ^ low)
    state = mix_bits((state + ((index >> 32) & MASK_32) + high) & MASK_32)
    return state >> (32 - RANDOM_BITS)


def hash_uniform(seed: int, epoch: int, index: Tensor, stream: int) -> Tensor:
    """Draw one uniform number for every sample.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        index: Rows, (B,) int64.
        stream: Number of the draw; different streams give independent numbers.

    Returns:
        (B,) float32 in [0, 1), on the device of `index`.
    """
    return hash_bits(seed, epoch, index, [stream])[0].to(torch.float32) * 2.0**-RANDOM_BITS


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global generators inside a block and restore them afterwards.

    They are those of torch (CPU), Python and NumPy.

    Args:
        seed: Seed for all three; NumPy gets the lowest 32 bits.
    """
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & MASK_32)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
