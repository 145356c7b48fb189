"""Ghosts: a forward that computes nothing in front of a stage, for stages whose output is replaced anyway.

The whole model is called, but the modules that end before the stage return empty tensors of the right shape, and the
hook at the stage's end puts the replacement in the place of what they made. So it works for any model that can be reset
there, whatever its code does between its modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.features.tracing import Call, Trace


class ModuleStubs:
    """`with Ghosts(model, trace, end)(batch):` the model computes nothing that ends before `end`."""

    def __init__(self, model: nn.Module, tr: Trace, end: StageBoundary):
        traced = tr.x.shape[0]
        over = [c[0] for n, c in tr.calls.items() if n and len(c) == 1 and c[0].left <= end.left]
        plain = {
            c.name: c
            for c in over
            if c.bare and c.values and c.inputs and c.shapes[0][0] % traced == 0
        }
        modules = {name: model.get_submodule(name) for name in plain if not _inside(name, plain)}
        self._ghosts = [
            (module, _ghost(plain[name], traced))
            for name, module in modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    @contextlib.contextmanager
    def __call__(self, batch: int) -> Iterator[None]:
        before = [(module, module.__dict__.get("forward")) for module, _ in self._ghosts]
        for module, ghost in self._ghosts:
            module.forward = ghost(batch)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, own in before:
                del module.forward
                if own is not None:
                    module.forward = own  # type: ignore[method-assign]


def _inside(name: str, names: dict[str, Call]) -> bool:
    return any(name[:i] in names for i, c in enumerate(name) if c == ".")


def _ghost(call: Call, traced: int) -> Callable[[int], Callable[..., Tensor]]:
    each, sizes = call.shapes[0][0] // traced, call.shapes[0][1:]

    def of(batch: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            return torch.empty(batch * each, *sizes, device=x.device, dtype=x.dtype)

        return forward

    return of
