"""The few collectives that more than one room needs; each is the identity in a run of one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def processes() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one. All ranks must call it."""
    if not active():
        return flag
    seen = torch.tensor(float(flag), device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def sum_ranks(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if active():
        dist.all_reduce(x)
    return x


def gather(x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have one shape, in the order of ranks; without gradient."""
    if not active():
        return [x]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(found, x.contiguous())
    return found


@torch.no_grad()
def copy_from(source: int, tensors: Iterable[Tensor]) -> None:
    """Rank `source`'s values in the tensors of every rank, in place."""
    if active():
        for tensor in tensors:
            value = tensor.contiguous()  # collectives take no channels_last
            dist.broadcast(value, src=source)
            tensor.copy_(value)


def copy_state_from(source: int, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """What rank `source`'s optimizer keeps of these parameters (momentum, ...), on every rank."""
    if not active():
        return
    state: dict[Any, Any] = getattr(optimizer, "optimizer", optimizer).state
    kept = [{i: dict(state[p]) for i, p in enumerate(parameters) if p in state} if rank() == source else None]
    device = parameters[0].device
    dist.broadcast_object_list(kept, src=source, device=device if device.type != "cpu" else None)
    for i, values in (kept[0] or {}).items() if rank() != source else ():
        state[parameters[i]] = {k: v.to(device) if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()}


def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all ranks evaluate the same network."""
    copy_from(0, module.buffers())
