"""Collective operations over the processes of a run; in a run of one process each does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether the run has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes, from 1."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_max(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest over all ranks of each number; all ranks call it.

    Args:
        values: Numbers of this rank, as many on every rank.
        device: Device for the exchange.

    Returns:
        The same on every rank.
    """
    if not is_distributed():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found: list[float] = largest.tolist()
    return found


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; all ranks call it.

    Args:
        x: Tensor of one shape on all ranks.

    Returns:
        `x` itself.
    """
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> list[Tensor]:
    """Collect a tensor of every rank, without gradient; all ranks call it.

    Args:
        x: Tensor of one shape on all ranks.

    Returns:
        One tensor for each rank, in their order.
    """
    if not is_distributed():
        return [x]
    gathered = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())
    ]
    dist.all_gather(gathered, x.contiguous())
    return gathered


def from_main(action: Callable[[], T]) -> T:
    """Do something on rank 0 alone; all ranks call it, and get its result or its error.

    Args:
        action: What rank 0 does.

    Returns:
        What the action returned on rank 0, pickled on its way to the others.

    Raises:
        Exception: The error of rank 0, on every rank.
    """
    if not is_distributed():
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gather_objects(value: T) -> list[T]:
    """Collect an object of every rank; all ranks call it.

    Args:
        value: The object of this rank, which is pickled on its way to the others.

    Returns:
        One object for each rank, in their order.
    """
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T, device: torch.device) -> T:
    """The object of rank 0; all ranks call it.

    Args:
        value: The object of this rank, which is pickled on its way to the others.
        device: Device for the exchange.
    """
    if not is_distributed():
        return value
    kept = [value]
    dist.broadcast_object_list(kept, src=0, device=device if device.type != "cpu" else None)
    return kept[0]


@torch.no_grad()
def broadcast_parameters(source: int, tensors: Iterable[Tensor]) -> None:
    """Copy the values of one rank to all others, in place; all ranks call it.

    Args:
        source: The rank whose values are copied.
        tensors: The same tensors, in the same order, on every rank.
    """
    if not is_distributed():
        return
    for tensor in tensors:
        value = tensor.contiguous()  # collectives do not take channels_last
        dist.broadcast(value, src=source)
        tensor.copy_(value)


def broadcast_optimizer_state(
    source: int, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """Copy what one rank's optimizer keeps of parameters (momentum, ...); all ranks call it.

    Args:
        source: The rank whose state is copied.
        optimizer: The optimizer of this rank, as it is or prepared by accelerate.
        parameters: The parameters, in the same order on every rank.
    """
    if not is_distributed():
        return
    state: dict[Tensor, Any] = getattr(optimizer, "optimizer", optimizer).state
    device = parameters[0].device
    kept: list[dict[int, dict[str, Any]] | None] = [None]
    if rank() == source:
        kept = [{i: dict(state[p]) for i, p in enumerate(parameters) if p in state}]
    dist.broadcast_object_list(kept, src=source, device=device if device.type != "cpu" else None)
    if rank() == source:
        return
    for i, values in (kept[0] or {}).items():
        state[parameters[i]] = {key: _moved(value, device) for key, value in values.items()}


def _moved(value: object, device: torch.device) -> object:
    """A tensor on the device; step counters (0-dimensional) stay where they are."""
    return value.to(device) if isinstance(value, Tensor) and value.dim() else value


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers, such as BatchNorm statistics, so that all ranks evaluate one network.

    Args:
        module: The same module on every rank.
    """
    broadcast_parameters(0, module.buffers())
