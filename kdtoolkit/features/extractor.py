"""Taps: what a model gives away between its stages, and stage-reset forwarding.

A forward hook on the module (rarely: modules) that ends a stage stores its output and, in a reset pass, returns the
replacement in its place. Nothing else of the model is touched: whatever comes next takes what the hook returned.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.features.hooks import Stop, Store, hook
from kdtoolkit.features.preprocess import input_shape
from kdtoolkit.features.reset_check import find_reset_leaks
from kdtoolkit.features.stage_boundary import StageBoundary as StageEnd
from kdtoolkit.features.stage_boundary import innermost, split_tensors, stage_at
from kdtoolkit.features.stage_matching import module_chain
from kdtoolkit.features.stages import find_stages
from kdtoolkit.features.stubs import ModuleStubs
from kdtoolkit.features.tracing import Trace, trace_model
from kdtoolkit.types import Out, Shape, TapKey
from kdtoolkit.utils.registry import suggestion

OVERWRITTEN = (
    "is overwritten in place by a later operation: the feature would not be what the stage returned. Tap the module "
    "that overwrites it, or build the model with inplace=False"
)
Replacement = (
    Tensor | Sequence[Tensor]
)  # of the feature at a tap; several tensors where the stage ends in several


class Taps:
    """A model with taps. Not an nn.Module: it adds no parameters, no state and no prefix to the model's names.

    model  any nn.Module that maps images (B, 3, H, W) to logits (B, C)
    at     stage numbers (1 is the first, -1 the last), module names, or members of what a module returns
           ("stage3[1]", "backbone[out]"); () taps every stage, None nothing
    size   image size: (3, H, W), (H, W) or H; default the model's own, else 224

    `shapes[key]` is a Shape per tap, without the batch; `names[key]` the module that ends the stage; `strides[key]` the
    image's height over the feature's. They are measured by one pass on the meta device where the model can run there.
    Where a stage ends in several tensors, the feature is the one that the stage is known for, and `end(key).boundary`
    lists what goes on to the next stage. ValueError for a tap that does not exist, does not fire, fires twice, returns
    no feature of the image, or is overwritten in place.
    """

    def __init__(self, model: nn.Module, at: Sequence[TapKey] | None = (), size: Any = None):
        if isinstance(at, (str, int)):
            raise ValueError(
                f"at={at!r}: give a list of taps, [{at!r}]; () is every stage, None none"
            )
        self.model = model
        self.size = image_size(model, size)
        self._store = Store()
        self._handles: list[Any] = []
        self._trace: Trace | None = None
        self._stages: list[StageEnd] | None = None
        self._ends: dict[TapKey, StageEnd] = {}
        self._chains: dict[tuple[TapKey, TapKey], list[nn.Module] | None] = {}
        self._ghosts: dict[TapKey, ModuleStubs | None] = {}
        self._forward: Any = self._plain
        if at is not None:
            self.select(list(at) if at else list(range(1, len(self.stages) + 1)))

    # ---------------------------------------------------------------------------------------------------- structure
    @property
    def trace(self) -> Trace:
        if self._trace is None:
            self._trace = trace_model(self.model, self.size)
        return self._trace

    @property
    def stages(self) -> list[StageEnd]:
        """Every stage that was found, tapped or not."""
        if self._stages is None:
            self._stages = find_stages(self.trace)
        return self._stages

    @property
    def keys(self) -> list[TapKey]:
        return list(self._ends)

    @property
    def shapes(self) -> dict[TapKey, Shape]:
        return {key: end.shape for key, end in self._ends.items()}

    @property
    def names(self) -> dict[TapKey, str]:
        return {key: end.name for key, end in self._ends.items()}

    @property
    def strides(self) -> dict[TapKey, float]:
        return {key: end.stride for key, end in self._ends.items()}

    def end(self, key: TapKey) -> StageEnd:
        """The stage end that `key` (a number or a module's name) means, tapped or not."""
        if isinstance(key, int):
            if not self.stages or not 1 <= abs(key) <= len(self.stages):
                raise ValueError(
                    f"{type(self.model).__name__} has {len(self.stages)} stages, stage {key} is none of them; "
                    "give a number from 1 (or -1 for the last), or a module's name"
                )
            return self.stages[key - 1 if key > 0 else key]
        modules = dict(self.model.named_modules())
        module, path = split_tensors(key)
        if module not in modules:
            children = [n for n, _ in self.model.named_children()]
            hint = suggestion(module, [*children, *modules])
            raise ValueError(
                f"tap {key!r} is not a module of {type(self.model).__name__}; its children: {', '.join(children)}{hint}"
            )
        module = module if module in self.trace.calls else innermost(self.trace, module)
        calls = self.trace.calls.get(module, [])
        if len(calls) != 1:
            often = "never fired" if not calls else f"fired {len(calls)} times in one forward"
            raise ValueError(f"tap {key!r} {often}: {self._why(module)}")
        end = stage_at(self.trace, module + path, deepen=True)
        if end is None:
            inside = (
                f"; it returns {', '.join(map(repr, calls[0].paths))}"
                if path and calls[0].values
                else ""
            )
            raise ValueError(
                f"tap {key!r} returns no feature of the image: shape {calls[0].shapes}{inside}; "
                f"expected (B, C, H, W), (B, H, W, C), (B, L, C) or (B, C) ({self._nearby(module)})"
            )
        return end

    def _nearby(self, key: str) -> str:
        inside = [
            n
            for n, c in self.trace.calls.items()
            if n.startswith(key + ".") and c[0].bare and len(c) == 1
        ]
        return (
            "for instance " + ", ".join(repr(n) for n in inside[-3:])
            if inside
            else "none inside returns one tensor"
        )

    def _why(self, key: str) -> str:
        if len(self.trace.calls.get(key, [])) > 1:
            return "the model uses it several times; tap a module that runs once"
        if isinstance(self.model.get_submodule(key), (nn.ModuleList, nn.ModuleDict)):
            return f"it is a list that the model iterates over and never calls; {self._nearby(key)}"
        return f"the model does not call it (fused or skipped); {self._nearby(key)}"

    def select(self, keys: Sequence[TapKey]) -> Taps:
        """Put hooks on these taps and no others. Negative stage numbers become positive ones."""
        ends = {self.key(k): self.end(k) for k in keys}
        for key, end in ends.items():
            if end.overwritten:
                raise ValueError(f"tap {key!r} ({end.name}) {OVERWRITTEN}")
        self.remove()
        self._ends = ends
        for key, end in ends.items():
            self._handles += hook(self.model, key, end, self._store)
        return self

    def key(self, key: TapKey) -> TapKey:
        """The key under which a tap's feature is returned: -1 becomes the number of the last stage."""
        return key + len(self.stages) + 1 if isinstance(key, int) and key < 0 else key

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._ends, self._chains, self._ghosts = [], {}, {}, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        """Taps of the copied model, found once for both."""
        taps = Taps(copy.deepcopy(self.model, memo), None, self.size)
        taps._trace, taps._stages = self._trace, self._stages
        memo[id(self)] = taps
        return taps.select(self.keys)

    def __reduce__(self) -> tuple:
        return Taps, (self.model, tuple(self.keys) or None, self.size)

    def compile(self) -> None:
        """Compile the forward; hooks must not be changed afterwards."""
        self._forward = torch.compile(self._plain)

    # ------------------------------------------------------------------------------------------------------ forward
    def __call__(self, x: Tensor, replace: Mapping[TapKey, Replacement] | None = None) -> Out:
        """Logits (B, C) and the features of the taps. `replace` {tap: feature} gives the rest of the network another
        output of that stage (one tensor for each of `end(tap).boundary`); what is stored is still the model's own."""
        logits, feats = self._forward(self.prepare(x), self._checked(replace))
        self._check_logits(logits)
        self._check_feats(self._ends)
        return Out(logits, feats)

    def prepare(self, x: Tensor) -> Tensor:
        """What is done to the image before the model: nothing here."""
        return x

    def _plain(
        self, x: Tensor, replace: Mapping[TapKey, dict[int, Tensor]]
    ) -> tuple[Any, dict[TapKey, Tensor]]:
        store = self._store
        store.begin(replace)
        try:
            logits = self.model(x)
        finally:
            store.active = False
        return logits, {
            key: store.feats[key, end.main]
            for key, end in self._ends.items()
            if (key, end.main) in store.feats
        }

    def _checked(
        self, replace: Mapping[TapKey, Replacement] | None
    ) -> dict[TapKey, dict[int, Tensor]]:
        """{tap: {part of the stage: tensor}}."""
        checked = {}
        for given, value in (replace or {}).items():
            key, tensors = self.key(given), [value] if isinstance(value, Tensor) else list(value)
            if key not in self._ends:
                raise ValueError(
                    f"cannot replace {key!r}, no tap is there; taps: {', '.join(map(repr, self._ends))}"
                )
            self.check_cut(key)
            end = self._ends[key]
            if len(tensors) != len(end.boundary):
                names = ", ".join(f"{p.name} {tuple(p.shape)}" for p in end.boundary)
                raise ValueError(
                    f"stage {key!r} of {type(self.model).__name__} ends in {len(end.boundary)} tensors, {len(tensors)} "
                    f"were given; give one for each of: {names}"
                )
            checked[key] = dict(
                zip((i for i, p in enumerate(end.parts) if p.read), tensors, strict=True)
            )
        return checked

    def check_cut(self, key: TapKey) -> None:
        """ValueError unless the output of this tap can be replaced."""
        end = self.end(key)
        if not end.cut:
            raise ValueError(
                f"cannot reset {type(self.model).__name__} at {key!r} ({end.name}): other paths lead past it from the "
                "image to the logits; choose a tap where the whole network passes through one tensor"
            )

    def _check_logits(self, logits: Any) -> None:
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returns {type(logits).__name__}, logits must be one tensor (B, C); "
                "wrap the model or set the option that makes it return logits alone"
            )

    def _check_feats(self, ends: Mapping[TapKey, StageEnd]) -> None:
        store = self._store
        for key, end in ends.items():
            for number, part in enumerate(end.parts):
                place = key, number
                fired = store.fired.get(place, 0)
                if fired != 1:
                    often = "never fired" if not fired else f"fired {fired} times"
                    raise RuntimeError(
                        f"tap {key!r} ({part.name}) {often}: gradient checkpointing calls the children of a block "
                        "directly, some options fuse blocks, and a model that was compiled and called before has no "
                        "place for hooks. Tap a module inside it, turn the option off, or pass the model uncompiled"
                    )
                if store.versions.get(place, -1) not in (-1, store.feats[place]._version):
                    raise RuntimeError(f"tap {key!r} ({part.name}) {OVERWRITTEN}")
                if (
                    torch.is_grad_enabled()
                    and not store.grad.get(place, True)
                    and self._learns(part.module)
                ):
                    raise RuntimeError(
                        f"tap {key!r} ({part.name}) was computed without autograd, no gradient would reach the "
                        "network from it: reentrant gradient checkpointing does that. Use use_reentrant=False, or "
                        "turn checkpointing off"
                    )

    def _learns(self, module: str) -> bool:
        """Whether anything up to that module is trained."""
        left = self.trace.calls[module][0].left
        names = [name for name, calls in self.trace.calls.items() if calls[0].left <= left]
        return any(
            p.requires_grad for name in names for p in self.model.get_submodule(name).parameters()
        )

    def rehearse(self) -> None:
        """A forward in training mode without numbers: what would fail in the first batch fails now. ValueError for
        logits that are no tensor, RuntimeError for a tap that does not fire. Models that cannot run on the meta device
        are not rehearsed."""
        shadow = self.trace.model
        if shadow is self.model:
            return
        taps = Taps(shadow, None, self.size)
        taps._trace, taps._stages = self._trace, self._stages
        try:
            taps.select(self.keys)
            shadow.train()
            try:
                logits, _ = taps._plain(self.trace.x.detach(), {})
            except Exception:  # data-dependent code
                return
            taps._check_logits(logits)
            taps._check_feats(taps._ends)
        finally:
            shadow.eval()
            taps.remove()

    # -------------------------------------------------------------------------------------------------------- reset
    def reset(
        self, x: Tensor, replace: Mapping[TapKey, Replacement], want: Sequence[TapKey]
    ) -> dict[TapKey, Tensor]:
        """Stage-reset forwarding: {tap: the model's own stage run on the replacement of the tap before it}.

        x        (B, 3, H, W) the image, needed only where a stage cannot be run alone
        replace  {tap: feature in the shape of that tap}
        want     taps whose features are returned, each after a replaced one

        A stage that is a chain of called modules is run by itself. Where that holds for every wanted tap, nothing in
        front of the first replacement, between the stages or behind the last is computed; else it is one forward that
        begins behind the first replacement and stops after the last wanted tap.
        """
        checked = self._checked(replace)
        order = sorted(self._ends, key=lambda k: self._ends[k].left)
        before: dict[TapKey, TapKey] = {}
        for key in want:
            earlier = [
                k for k in order if self._ends[k].left < self._ends[key].left and k in checked
            ]
            if not earlier:
                raise ValueError(
                    f"nothing is replaced in front of {key!r}, its reset output would be the plain one"
                )
            before[key] = earlier[-1]
        chains = {key: self._chain(before[key], key) for key in want}
        if all(c is not None for c in chains.values()):
            outputs = {}
            for key, modules in chains.items():
                (feature,) = checked[before[key]].values()
                for module in modules or ():
                    feature = module(feature)
                outputs[key] = feature
            return outputs
        last = max(want, key=order.index)
        self._store.begin(checked, last)
        try:
            with self._skipping(min(checked, key=order.index), x.shape[0]):
                self.model(self.prepare(x))
        except Stop:
            pass
        finally:
            self._store.active = False
        return {key: self._store.feats[key, self._ends[key].main] for key in want}

    def rest(self, x: Tensor, at: TapKey, feature: Replacement) -> Out:
        """The network behind the stage `at`, run on `feature` in place of that stage's output (one tensor for each of
        `end(at).boundary`); nothing in front of it is computed. Of x (B, 3, H, W) only the size is looked at. Features
        are those of the taps behind the stage."""
        checked, end = self._checked({at: feature}), self.end(at)
        with self._skipping(self.key(at), x.shape[0]):
            logits, feats = self._plain(self.prepare(x), checked)
        behind = {key: e for key, e in self._ends.items() if e.left > end.left}
        self._check_logits(logits)
        self._check_feats(behind)
        return Out(logits, {key: feats[key] for key in behind})

    def _skipping(self, key: TapKey, batch: int) -> contextlib.AbstractContextManager[None]:
        """Nothing in front of a replaced stage is computed, where it is proven that nothing else reads it."""
        if key not in self._ghosts:
            exact = not find_reset_leaks(self, [key])
            self._ghosts[key] = (
                ModuleStubs(self.model, self.trace, self.end(key)) if exact else None
            )
        ghosts = self._ghosts[key]
        return contextlib.nullcontext() if ghosts is None else ghosts(batch)

    def _chain(self, start: TapKey, end: TapKey) -> list[nn.Module] | None:
        if (start, end) not in self._chains:
            names = module_chain(self.trace, self._ends[start], self._ends[end])
            modules = None if names is None else [self.model.get_submodule(n) for n in names]
            self._chains[start, end] = modules
        return self._chains[start, end]


def image_size(model: nn.Module, size: Any = None) -> tuple[int, int, int]:
    """(channels, H, W) from H, (H, W), (3, H, W) or, by default, the model's own configuration."""
    own = input_shape(model)
    if isinstance(size, str):
        raise ValueError(f"image size {size!r} is not H, (H, W) or (3, H, W)")
    given = (
        own
        if size is None
        else (size, size)
        if isinstance(size, int)
        else tuple(int(s) for s in size)
    )
    if len(given) not in (2, 3) or min(given) < 1:
        raise ValueError(f"image size {size} is not H, (H, W) or (3, H, W)")
    channels, height, width = given if len(given) == 3 else (own[0], *given)
    return channels, height, width
