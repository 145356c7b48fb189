"""The few collectives that more than one room needs; each is the identity in a run of one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one. All ranks must call it."""
    if not is_distributed():
        return flag
    seen = torch.tensor(float(flag), device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_gather(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have one shape, in the order of ranks; without gradient."""
    if not is_distributed():
        return [x]
    found = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())
    ]
    dist.all_gather(found, x.contiguous())
    return found


@torch.no_grad()
def broadcast_parameters(source: int, tensors: Iterable[Tensor]) -> None:
    """Rank `source`'s values in the tensors of every rank, in place."""
    if is_distributed():
        for tensor in tensors:
            value = tensor.contiguous()  # collectives take no channels_last
            dist.broadcast(value, src=source)
            tensor.copy_(value)


def broadcast_optimizer_state(
    source: int, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """What rank `source`'s optimizer keeps of these parameters (momentum, ...), on every rank."""
    if not is_distributed():
        return
    state: dict[Any, Any] = getattr(optimizer, "optimizer", optimizer).state
    kept = [
        {i: dict(state[p]) for i, p in enumerate(parameters) if p in state}
        if rank() == source
        else None
    ]
    device = parameters[0].device
    dist.broadcast_object_list(kept, src=source, device=device if device.type != "cpu" else None)
    for i, values in (kept[0] or {}).items() if rank() != source else ():
        state[parameters[i]] = {
            k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()
        }


def broadcast_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all ranks evaluate the same network."""
    broadcast_parameters(0, module.buffers())
