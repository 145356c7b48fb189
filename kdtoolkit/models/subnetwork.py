"""What lies behind a stage of a network: tails with weights of their own, trunks that networks share, embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.extractor import Replacement, Taps
from kdtoolkit.features.reset_check import find_reset_leaks
from kdtoolkit.features.tracing import quiet
from kdtoolkit.models.head import classifier_names
from kdtoolkit.models.layer_groups import modules_up_to, parameters_up_to
from kdtoolkit.types import Out, TapKey


class Cut(NamedTuple):
    """The two sides of a stage's end, by names of modules and parameters.

    trunk    modules that are over when the stage ends, with all that is inside;  behind  the outermost that begin then
    mixed    all others: those that hold modules or parameters of both sides
    loose_trunk, loose_behind  parameters that lie in mixed modules themselves
    """

    trunk: list[str]
    behind: list[str]
    mixed: list[str]
    loose_trunk: list[str]
    loose_behind: list[str]


def cut_at(taps: Taps, stage: TapKey) -> Cut:
    """ValueError unless the network can be run from this stage's output alone."""
    taps.check_cut(stage)
    wrong = find_reset_leaks(taps, [stage])
    if wrong:
        raise ValueError(
            f"{type(taps.model).__name__} cannot be run from {stage!r} on: {'; '.join(wrong)}; choose another cut"
        )
    model, left = taps.model, taps.end(stage).left
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    trunk = modules_up_to(taps, stage)
    in_front = {id(parameters[name]) for name in parameters_up_to(taps, stage)}
    early = {
        id(modules[n])
        for n, calls in taps.trace.calls.items()
        if any(c.entered <= left for c in calls)
    }
    early |= {id(modules[name]) for name in trunk}
    later = {
        name
        for name, module in modules.items()
        if not any(id(m) in early for m in module.modules())
        and not any(id(p) in in_front for p in module.parameters())
    }
    mixed = [name for name in modules if name not in later and name not in set(trunk)]
    loose = [
        _joined(name, p)
        for name in mixed
        for p, t in modules[name]._parameters.items()
        if t is not None
    ]
    return Cut(
        trunk=trunk,
        behind=[name for name in modules if name in later and name.rpartition(".")[0] not in later],
        mixed=mixed,
        loose_trunk=[name for name in loose if id(model.get_parameter(name)) in in_front],
        loose_behind=[name for name in loose if id(model.get_parameter(name)) not in in_front],
    )


def behind(net: nn.Module, cut: Cut) -> dict[str, nn.Parameter]:
    """Parameters behind the cut."""
    inside = tuple(f"{name}." for name in cut.behind)
    return {
        name: p
        for name, p in net.named_parameters()
        if name.startswith(inside) or name in cut.loose_behind
    }


def last_boundary(taps: Taps) -> TapKey:
    """The last stage in front of the last one at whose end the network can be cut."""
    for stage in range(len(taps.stages) - 1, 0, -1):
        if (
            taps.end(stage).cut
            and not taps.end(stage).overwritten
            and not find_reset_leaks(taps, [stage])
        ):
            return stage
    raise ValueError(
        f"{type(taps.model).__name__} has {len(taps.stages)} stages, and none in front of the last ends where the "
        "network can be cut: name the place with cut=..., a module through which everything passes"
    )


def cut_of(taps: Taps, cut: TapKey) -> TapKey:
    """The tap of a cut; "auto" is the last boundary."""
    return last_boundary(taps) if cut == "auto" else taps.key(cut)


def boundary(taps: Taps, stage: TapKey) -> list[TapKey]:
    """Taps of the tensors from which the network behind the stage is run: mostly one, the stage itself."""
    end = taps.end(stage)
    return [taps.key(stage)] if len(end.parts) == 1 else [part.name for part in end.boundary]


def graft(net: nn.Module, onto: nn.Module, cut: Cut) -> None:
    """Give `net` the trunk of `onto`, a network of the same architecture: the same modules and parameters, wherever
    `net` holds its own. It stays a complete network."""
    mine, its = dict(net.named_modules()), dict(onto.named_modules())
    modules = {id(mine[name]): its[name] for name in cut.trunk}
    parameters = {id(net.get_parameter(name)): onto.get_parameter(name) for name in cut.loose_trunk}
    for module in list(mine.values()):
        for name, child in module._modules.items():
            module._modules[name] = modules.get(id(child), child)
        for name, p in module._parameters.items():
            module._parameters[name] = parameters.get(id(p), p)


class Tail(nn.Module):
    """What lies behind a stage of a complete network, with its parameters: `tail(x, feature) -> logits (B, C)`.

    net    the network, which stays complete; only what lies behind the stage is in the module tree (and the state
           dict, under the network's own names in `parts`)
    stage  number or module's name, as Taps takes it; ValueError where the network cannot be cut there
    size   image size, as Taps takes it
    read   further taps: `run` returns the features of those behind the stage, `whole` of all

    Nothing in front of the stage is computed. Of x (B, 3, H, W), as the network takes it, only the size is looked at;
    the feature is one tensor, or one for each of `taps.end(stage).boundary`.
    """

    def __init__(
        self, net: nn.Module, stage: TapKey, size: Any = None, *, read: Sequence[TapKey] = ()
    ):
        super().__init__()
        self.taps = Taps(net, None, size)
        self.stage, cut = self.taps.key(stage), cut_at(self.taps, stage)
        self.parts = nn.Module()
        for name in cut.behind:
            holder, last = _holder(self.parts, name)
            holder.add_module(last, net.get_submodule(name))
        for name in cut.loose_behind:
            holder, last = _holder(self.parts, name)
            holder.register_parameter(last, net.get_parameter(name))
        for name in cut.mixed:
            module = net.get_submodule(name)
            for last, tensor in module._buffers.items():
                holder, _ = _holder(self.parts, _joined(name, last))
                holder.register_buffer(
                    last, tensor, persistent=last not in module._non_persistent_buffers_set
                )
        held = [(net.get_submodule(name), _find(self.parts, name)) for name in cut.mixed]
        self._mixed = tuple((module, holder) for module, holder in held)
        self.taps.select([self.stage, *read])

    @property
    def network(self) -> nn.Module:
        """The complete network."""
        return self.taps.model

    def forward(self, x: Tensor, feature: Replacement) -> Tensor:
        return self.run(x, feature).logits

    def run(self, x: Tensor, feature: Replacement) -> Out:
        """Logits, and features of the taps behind the stage."""
        self._settle()
        return self.taps.rest(x, self.stage, feature)

    def whole(self, x: Tensor) -> Out:
        """The complete network, on images."""
        self._settle()
        return self.taps(x)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Tail:
        """What lies in mixed modules themselves is held twice: the network gets what came out."""
        super()._apply(fn, recurse)
        for module, holder in self._mixed:
            if holder is not None:
                module._buffers.update(holder._buffers)
                module._parameters.update(holder._parameters)
        return self

    def train(self, mode: bool = True) -> Tail:
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        """Modes of mixed modules are those of what stands for them here."""
        for module, holder in self._mixed:
            module.training = (self.parts if holder is None else holder).training


class Embedding:
    """The input of a network's classifier as a vector (B, D): a map is pooled, several classifiers' inputs are put side
    by side. `embedding.of(call, *args) -> (what the call returns, the vector)`."""

    def __init__(self, classifiers: Sequence[nn.Module]):
        self._inputs = [_Input(module) for module in classifiers]
        self._handles = [
            i.module.register_forward_pre_hook(i, with_kwargs=True) for i in self._inputs
        ]

    @classmethod
    def at(cls, taps: Taps) -> Embedding:
        return cls([taps.model.get_submodule(name) for name in _classifiers(taps)])

    def of(self, call: Callable[..., Any], *args: Any) -> tuple[Any, Tensor]:
        for i in self._inputs:
            i.active = True
        try:
            returned = call(*args)
            return returned, torch.cat([_vector(i.kept, i.module) for i in self._inputs], dim=1)
        finally:
            for i in self._inputs:
                i.active, i.kept = False, None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Embedding:
        return Embedding([copy.deepcopy(i.module, memo) for i in self._inputs])


class _Input:
    """The hook: it belongs to one module, a copy of the module carries it along without effect."""

    is_tap = True

    def __init__(self, module: Any):
        self.module, self.active = module, False
        self.kept: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self.module and self.active:
            self.kept = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Input:
        return self

    def __reduce__(self) -> tuple:
        return _Input, (None,)


def embedding_size(taps: Taps) -> int:
    """D, by one forward where the network was traced."""
    shadow = taps.trace.model
    embedding = Embedding([shadow.get_submodule(name) for name in _classifiers(taps)])
    try:
        with quiet(shadow), torch.no_grad():
            return embedding.of(shadow, taps.trace.x.detach())[1].shape[1]
    finally:
        embedding.remove()


def _classifiers(taps: Taps) -> list[str]:
    names = classifier_names(taps)
    if not names:
        raise ValueError(
            f"no classifier was found in {type(taps.model).__name__} (no get_classifier, and no nn.Linear makes its "
            "logits), and an embedding is a classifier's input: wrap the network or name its classifier"
        )
    return names


def _vector(x: Tensor | None, classifier: nn.Module) -> Tensor:
    if x is None:
        raise RuntimeError(
            f"the classifier ({type(classifier).__name__}) was not called: it has no input to give"
        )
    if x.dim() == 2:
        return x
    return x.flatten(1, -2).mean(1) if isinstance(classifier, nn.Linear) else x.flatten(2).mean(2)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _holder(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The empty module that stands for the one that `path` lies in, and the last part of the path."""
    *names, last = path.split(".")
    for name in names:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    return root, last


def _find(root: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        found = root._modules.get(name)
        if found is None:
            return None
        root = found
    return root
