"""A network of the same architecture with other first weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def reinitialised_copy(net: nn.Module, seed: int) -> nn.Module:
    """A copy of `net` with weights drawn anew from `seed`: by `reset_parameters` of every module that has it, then by
    the model's own `init_weights`. Other parameters (class tokens, scales) keep a constant, or are drawn with the mean
    and standard deviation that they have. Frozen parameters, and buffers of modules whose parameters are all frozen,
    stay as they are, as do buffers that no module resets."""
    made = copy.deepcopy(net)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    device = next(made.parameters()).device
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in made.modules():
            _call(module, "reset_parameters")
        _call(made, "init_weights")
        for name, p in made.named_parameters():
            if not p.requires_grad:
                p.copy_(before[name])
                continue
            untouched = (
                device.type != "meta" and p.is_floating_point() and torch.equal(p, before[name])
            )
            if untouched and p.numel() > 1 and p.std() > 0:
                p.copy_(torch.randn(p.shape).to(p) * p.std() + p.mean())
        for mine, its in zip(made.modules(), net.modules(), strict=True):
            own = list(mine.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                for key, buffer in mine.named_buffers(recurse=False):
                    buffer.copy_(its.get_buffer(key))
    return made


def _call(module: nn.Module, name: str) -> None:
    method: Callable[..., Any] | Any = getattr(module, name, None)
    if callable(method):
        try:
            method()
        except TypeError:  # one that wants arguments is not an initialisation of its own
            return
