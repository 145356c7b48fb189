"""The hooks of a tapped model, and what they share during one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.types import TapKey

Place = tuple[TapKey, int]  # a tap, and which of the tensors of its boundary
Replacements = Mapping[TapKey, Mapping[int, Tensor]]  # tap -> {tensor of its boundary: new tensor}


class StopForward(Exception):
    """Raised by the last tap of a reset pass: what follows is not needed."""


class FeatureStore:
    """What the hooks of one model share during a forward.

    Attributes:
        feats: The tensors that the model itself made.
        versions: How often each had been written into when its module returned.
        fired: How often each was returned.
        grad: Whether autograd was on when each was computed.
        replace: What is given to the rest of the network in place of a tap's tensors.
        last: The forward stops at this tap; None for a whole forward.
        active: Whether a forward is going on that the hooks belong to.
    """

    def __init__(self) -> None:
        self.begin({})
        self.active = False

    def begin(self, replace: Replacements, last: TapKey | None = None) -> None:
        """Forget the last forward and wait for the next.

        Args:
            replace: Replacements of the next forward.
            last: Tap at which it stops.
        """
        self.feats: dict[Place, Tensor] = {}
        self.versions: dict[Place, int] = {}
        self.fired: dict[Place, int] = {}
        self.grad: dict[Place, bool] = {}
        self.replace, self.last, self.active = replace, last, True


def remove_tap_hooks(model: nn.Module) -> nn.Module:
    """Remove the hooks of taps, such as those that a copy of a tapped model carries along.

    Args:
        model: Any model; it is changed in place.

    Returns:
        The same model.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [n for n, hook in hooks.items() if getattr(hook, "is_tap", False)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    return model


def register_hooks(
    model: nn.Module, key: TapKey, boundary: StageBoundary, store: FeatureStore
) -> list[RemovableHandle]:
    """Register the hooks of one tap.

    Args:
        model: The model.
        key: The tap.
        boundary: The tensors that it reads and replaces.
        store: Where their values go.

    Returns:
        Handles that remove the hooks.
    """
    handles = []
    indexed = list(enumerate(boundary.tensors))
    last_return = {tensor.module: tensor.returned_at for tensor in boundary.tensors}
    last_module = max(last_return, key=lambda name: last_return[name])
    for name in last_return:
        outputs = [
            (index, tensor.leaf_index, tensor.is_read and not tensor.consumers)
            for index, tensor in indexed
            if tensor.module == name
        ]
        module = model.get_submodule(name)
        hook = _OutputHook(key, module, store, outputs, name == last_module)
        handles.append(module.register_forward_hook(hook))
    consumers = [name for tensor in boundary.tensors for name in tensor.consumers]
    for name in dict.fromkeys(consumers):
        indices = [index for index, tensor in indexed if name in tensor.consumers]
        module = model.get_submodule(name)
        input_hook = _InputHook(key, module, store, indices)
        handles.append(module.register_forward_pre_hook(input_hook, with_kwargs=True))
    return handles


class _Hook:
    """A hook that belongs to one module of one model.

    A deep copy of the model (an EMA) carries it along without effect, and so does a pickled copy.
    """

    is_tap = True

    def __init__(self, key: TapKey, module: nn.Module, store: FeatureStore) -> None:
        self.key, self.module, self.store = key, module, store

    def __deepcopy__(self, memo: dict[int, object]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _make_inert, ()


class _OutputHook(_Hook):
    """Behind a module that ends a stage: stores its output and, in a reset pass, replaces it.

    Args:
        key: The tap.
        module: The module.
        store: Where the tensors go.
        outputs: Of each tensor: its index in the boundary, its place among the leaves of the
            output, and whether it is replaced here.
        is_last: Whether this is the last of the stage's modules.
    """

    def __init__(
        self,
        key: TapKey,
        module: nn.Module,
        store: FeatureStore,
        outputs: Sequence[tuple[int, int, bool]],
        is_last: bool,
    ) -> None:
        super().__init__(key, module, store)
        self.outputs, self.is_last = tuple(outputs), is_last

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> object:
        store, key = self.store, self.key
        if module is not self.module or not store.active:
            return None
        leaves, spec = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
        for index, leaf, _ in self.outputs:
            store.fired[key, index] = store.fired.get((key, index), 0) + 1
            store.feats[key, index] = leaves[leaf]
            if not torch.compiler.is_compiling():
                store.grad[key, index] = torch.is_grad_enabled()
                store.versions[key, index] = leaves[leaf]._version
        if self.is_last and key == store.last:
            raise StopForward
        replacement = store.replace.get(key)
        if replacement is None:
            return None
        for index, leaf, is_replaced_here in self.outputs:
            if is_replaced_here:
                leaves[leaf] = replacement[index]
        return leaves[0] if spec is None else tree_unflatten(leaves, spec)


class _InputHook(_Hook):
    """In front of a module that reads a tensor of an earlier stage: replaces it for it alone.

    Args:
        key: The tap of the earlier stage.
        module: The module.
        store: Where the tensors are.
        indices: Which tensors of the boundary the module reads.
    """

    def __init__(
        self, key: TapKey, module: nn.Module, store: FeatureStore, indices: Sequence[int]
    ) -> None:
        super().__init__(key, module, store)
        self.indices = tuple(indices)

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        store = self.store
        is_own_forward = module is self.module and store.active
        replacement = store.replace.get(self.key) if is_own_forward else None
        if replacement is None:
            return None
        pairs = [(store.feats.get((self.key, i)), replacement[i]) for i in self.indices]

        def replaced(leaf: object) -> object:
            return next((new for old, new in pairs if old is not None and leaf is old), leaf)

        new_args: tuple[object, ...] = tree_map(replaced, args)
        new_kwargs: dict[str, object] = tree_map(replaced, kwargs)
        return new_args, new_kwargs


def _inert(*_: object) -> None:
    """What a hook becomes in a pickled copy of its model."""


def _make_inert() -> Callable[..., None]:
    return _inert
