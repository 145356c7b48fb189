"""The hooks of a tapped model, and what they share during one forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Stage


class Stop(Exception):
    """Raised by the last tap of a reset pass: what follows is not needed."""


class Store:
    """What the hooks of one model share during a forward."""

    def __init__(self) -> None:
        self.active = False
        self.feats: dict[Stage, Tensor] = {}
        self.versions: dict[Stage, int] = {}
        self.fired: dict[Stage, int] = {}
        self.replace: Mapping[Stage, Tensor] = {}
        self.last: Stage | None = None

    def begin(self, replace: Mapping[Stage, Tensor], last: Stage | None = None) -> None:
        self.feats, self.versions, self.fired, self.replace, self.last = {}, {}, {}, replace, last
        self.active = True


def _inert(*_: Any) -> None:
    """What a hook becomes in a pickled copy of its model."""


class Hook:
    """The hook of one tap. It belongs to one module of one model: a deep copy (an EMA of the model) carries it along
    without effect, and so does a pickled copy."""

    def __init__(self, key: Stage, module: nn.Module, store: Store):
        self.key, self.module, self.store = key, module, store

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        store = self.store
        if module is not self.module or not store.active:
            return None
        store.fired[self.key] = store.fired.get(self.key, 0) + 1
        store.feats[self.key] = output
        if isinstance(output, Tensor) and not torch.compiler.is_compiling():
            store.versions[self.key] = output._version
        if self.key == store.last:
            raise Stop
        return store.replace.get(self.key)

    def __deepcopy__(self, memo: dict) -> Hook:
        return self

    def __reduce__(self) -> tuple:
        return _make_inert, ()


def _make_inert() -> Any:
    return _inert
