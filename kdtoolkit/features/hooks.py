"""The hooks of a tapped model, and what they share during one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kdtoolkit.features.stage_boundary import StageBoundary as StageEnd
from kdtoolkit.types import TapKey


class Stop(Exception):
    """Raised by the last tap of a reset pass: what follows is not needed."""


class Store:
    """What the hooks of one model share during a forward. A tensor goes by (tap, number of the part of the stage)."""

    def __init__(self) -> None:
        self.begin({})
        self.active = False

    def begin(
        self, replace: Mapping[TapKey, Mapping[int, Tensor]], last: TapKey | None = None
    ) -> None:
        self.feats: dict[tuple[TapKey, int], Tensor] = {}
        self.versions: dict[tuple[TapKey, int], int] = {}
        self.fired: dict[tuple[TapKey, int], int] = {}
        self.grad: dict[
            tuple[TapKey, int], bool
        ] = {}  # whether autograd was on when it was computed
        self.replace, self.last, self.active = replace, last, True


def strip(model: nn.Module) -> nn.Module:
    """Without the hooks of taps, such as those that a copy of a tapped model carries along."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [n for n, hook in hooks.items() if getattr(hook, "is_tap", False)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    return model


def _inert(*_: Any) -> None:
    """What a hook becomes in a pickled copy of its model."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """It belongs to one module of one model: a deep copy of the model (an EMA) carries it along without effect, and so
    does a pickled copy."""

    is_tap = True

    def __init__(self, key: TapKey, module: nn.Module, store: Store):
        self.key, self.module, self.store = key, module, store

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self

    def __reduce__(self) -> tuple:
        return _make_inert, ()


class Hook(_Hook):
    """Behind a module that ends a stage: keeps its output and, in a reset pass, returns the replacement.

    places  (part of the stage, its place among the leaves of the output, whether it is replaced here)
    ends    whether this is the last of the stage's modules
    """

    def __init__(
        self,
        key: TapKey,
        module: nn.Module,
        store: Store,
        places: Sequence[tuple[int, int, bool]],
        ends: bool = True,
    ):
        super().__init__(key, module, store)
        self.places, self.ends = tuple(places), ends

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        store, key = self.store, self.key
        if module is not self.module or not store.active:
            return None
        bare = isinstance(output, Tensor)
        leaves, spec = ([output], None) if bare else tree_flatten(output)
        for part, leaf, _ in self.places:
            store.fired[key, part] = store.fired.get((key, part), 0) + 1
            store.feats[key, part] = leaves[leaf]
            if not torch.compiler.is_compiling():
                store.grad[key, part] = torch.is_grad_enabled()
                store.versions[key, part] = leaves[leaf]._version
        if self.ends and key == store.last:
            raise Stop
        given = store.replace.get(key)
        if given is None:
            return None
        for part, leaf, here in self.places:
            if here:
                leaves[leaf] = given[part]
        return leaves[0] if spec is None else tree_unflatten(leaves, spec)


class Taker(_Hook):
    """In front of a module that takes a tensor of an earlier stage which others must still get as it was."""

    def __init__(self, key: TapKey, module: nn.Module, store: Store, parts: Sequence[int]):
        super().__init__(key, module, store)
        self.parts = tuple(parts)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        store = self.store
        given = store.replace.get(self.key) if module is self.module and store.active else None
        if given is None:
            return None
        known = [(store.feats.get((self.key, part)), given[part]) for part in self.parts]

        def replaced(leaf: Any) -> Any:
            return next((new for old, new in known if old is not None and leaf is old), leaf)

        return tree_map(replaced, args), tree_map(replaced, kwargs)


def hook(model: nn.Module, key: TapKey, end: StageEnd, store: Store) -> list[Any]:
    """Put the hooks of one tap on the model; returns their handles."""
    handles = []
    modules = list(dict.fromkeys(part.module for part in end.parts))
    last = max(modules, key=lambda name: max(p.left for p in end.parts if p.module == name))
    for name in modules:
        module = model.get_submodule(name)
        places = [
            (i, p.leaf, p.read and not p.takers)
            for i, p in enumerate(end.parts)
            if p.module == name
        ]
        handles.append(module.register_forward_hook(Hook(key, module, store, places, name == last)))
    for name in dict.fromkeys(taker for part in end.parts for taker in part.takers):
        module = model.get_submodule(name)
        parts = [i for i, p in enumerate(end.parts) if name in p.takers]
        handles.append(
            module.register_forward_pre_hook(Taker(key, module, store, parts), with_kwargs=True)
        )
    return handles
