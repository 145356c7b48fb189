"""The few collectives that more than one room needs; each is the identity in a run of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every rank, so that all ranks evaluate the same network."""
    if active():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
