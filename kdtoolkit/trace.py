"""One traced forward: which module made which value, and where a network can be cut into stages.

The forward runs on a copy whose parameters live on the meta device (no memory, no arithmetic), with only the image
requiring grad, so the autograd graph is the data-flow graph from image to logits. A value is a place in that graph:
(grad_fn, output number). Nothing here knows a family of networks by name.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .types import Shape

Value = tuple[Any, int]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Call:
    """One call of one module during the traced forward."""

    name: str
    entered: int  # position in the order of all entries and exits
    left: int
    inputs: list[Value]  # image-dependent tensors among its arguments
    plain: bool  # called with one positional tensor and nothing else
    bare: bool  # returned a tensor, not a tuple, list or dict
    shapes: list[tuple[int, ...]]  # of the image-dependent tensors of its output
    values: list[Value]


@dataclass
class Trace:
    model: nn.Module
    x: Tensor
    logits: list[Tensor]
    calls: dict[str, list[Call]]
    bare_logits: bool
    _dominators: set[Value] | None = field(default=None, repr=False)

    def once(self, name: str) -> Call | None:
        """The call of a module that runs exactly once in a forward, else None."""
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None

    @property
    def dominators(self) -> set[Value]:
        """Values on every path from the image to the logits."""
        if self._dominators is None:
            self._dominators = _dominators(self.logits, self.x)
        return self._dominators


def _value(t: Tensor) -> Value | None:
    return (t.grad_fn, t.output_nr) if t.grad_fn is not None else None


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn is not None]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the structure whose parameters and buffers are on the meta device: no memory, no weights, eval mode."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo).eval()


def trace(model: nn.Module, size: tuple[int, int, int], batch: int = 2) -> Trace:
    """Trace one forward of `model` on images of `size` (3, H, W); on the meta device where the model can run there.

    The model itself is not changed. ValueError when it cannot run on images of this size.
    """
    try:
        shadow = meta_copy(model)
        return _run(shadow, torch.empty(batch, *size, device="meta", dtype=_dtype(shadow)))
    except Exception as meta_error:  # no deep copy, tensors outside parameters and buffers, data-dependent code
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise _cannot_run(model, size, meta_error) from meta_error
        flags = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(m, m.training) for m in model.modules()]
        try:
            model.eval().requires_grad_(False)
            return _run(model, torch.full((batch, *size), 0.5, device=device, dtype=_dtype(model)))
        except Exception as error:
            raise _cannot_run(model, size, error) from error
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
            for m, mode in modes:
                m.training = mode


def _cannot_run(model: nn.Module, size: tuple[int, ...], error: Exception) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot run on images of size {tuple(size)}: {error}. "
        "Pass images of the size it was built for, or build it for this size (img_size=..., in_chans=...)"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _forget(_: Any) -> Any:
    return None


def _run(model: nn.Module, x: Tensor) -> Trace:
    calls: dict[str, list[Call]] = defaultdict(list)
    stack: list[tuple[int, list[Value], bool]] = []
    clock = 0

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal clock
        clock += 1
        plain = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        stack.append((clock, [v for t in _tensors((args, kwargs)) if (v := _value(t))], plain))

    def leave(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal clock
            clock += 1
            entered, inputs, plain = stack.pop()
            tensors = _tensors(output)
            values = [v for t in tensors if (v := _value(t))]
            bare = isinstance(output, Tensor)
            shapes = [tuple(t.shape) for t in tensors]
            calls[name].append(Call(name, entered, clock, inputs, plain, bare, shapes, values))

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        leaf = x.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_forget, _forget):
            logits = model(leaf.clone())  # the graph keeps its structure and no activations
    finally:
        for handle in handles:
            handle.remove()
    return Trace(model, leaf, _tensors(logits), dict(calls), isinstance(logits, Tensor))


def _dominators(outputs: list[Tensor], leaf: Tensor) -> set[Value]:
    """Exact path counting: a value through which all paths leaf -> outputs pass is a dominator. Linear in the graph."""
    roots = [v for t in outputs if (v := _value(t))]
    order, seen, todo = [], set(), [(v[0], False) for v in roots]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [(parent, False) for parent, _ in node.next_functions if parent is not None and parent not in seen]
    below: dict[Any, int] = {}  # paths from the leaf up to a node
    for node in order:
        is_leaf = getattr(node, "variable", None) is leaf
        below[node] = 1 if is_leaf else sum(below[p] for p, _ in node.next_functions if p is not None)
    above: dict[Any, int] = defaultdict(int)  # paths from a node up to the outputs
    through: dict[Value, int] = defaultdict(int)
    for value in roots:
        above[value[0]] += 1
        through[value] += 1
    for node in reversed(order):
        for parent, number in node.next_functions:
            if parent is not None and above[node]:
                above[parent] += above[node]
                through[parent, number] += above[node]
    total = sum(below[v[0]] for v in roots)
    return {v for v, paths in through.items() if total and paths * below[v[0]] == total}


# ------------------------------------------------------------------------------------------------------------ stages
@dataclass(frozen=True)
class Stage:
    """The end of one stage: the module whose output is the feature, the feature's shape, and whether it is a cut."""

    name: str
    shape: Shape
    stride: float  # image height over grid height
    cut: bool  # every path from image to logits passes this value: the stage can be reset here
    left: int
    value: Value


def stage_at(tr: Trace, name: str, channels: int | None = None) -> Stage | None:
    """The stage that ends at module `name`; None unless it runs once and returns one image-dependent tensor."""
    call = tr.once(name)
    if channels is None:
        channels = next((e.get("num_chs") for e in feature_info(tr.model) if e.get("module") == name), None)
    if call is None or not call.bare or len(call.values) != 1:
        return None
    shape = layout(tr, call.shapes[0][1:], channels)
    if shape is None:
        return None
    stride = tr.x.shape[2] / shape.grid[0]
    return Stage(name, shape, stride, call.values[0] in tr.dominators, call.left, call.values[0])


def layout(tr: Trace, sizes: tuple[int, ...], channels: int | None = None) -> Shape | None:
    """What the dimensions of a feature mean, from its sizes, the image's aspect, and the model's own hints."""
    height, width = tr.x.shape[2:]
    if len(sizes) == 1:
        return Shape(sizes, "NC")
    if len(sizes) == 3:
        last = channels is not None and sizes[2] == channels != sizes[0]
        first = channels is not None and sizes[0] == channels != sizes[2]
        if not first and not last:
            off_first, off_last = (abs(math.log(g[0] / g[1] * width / height)) for g in (sizes[1:], sizes[:2]))
            hint = getattr(tr.model, "output_fmt", None)
            hint = getattr(hint, "value", hint)  # timm: an enum or a word
            last = off_last < off_first - 1e-6 or (abs(off_last - off_first) < 1e-6 and hint == "NHWC")
        return Shape(sizes, "NHWC" if last else "NCHW")
    if len(sizes) == 2:
        own: int = getattr(tr.model, "num_prefix_tokens", 0) or 0  # type: ignore[assignment]
        for prefix in dict.fromkeys([own, 0, 1, 2]):
            positions = sizes[0] - prefix
            rows = round(math.sqrt(max(positions, 0) * height / width))
            if rows > 0 and positions % rows == 0 and abs(math.log(rows * rows / positions * width / height)) < 0.35:
                return Shape(sizes, "NLC", (rows, positions // rows), prefix)
    return None


def find_stages(tr: Trace, groups: int = 4) -> list[Stage]:
    """The stages of a network, shallow to deep.

    First the places that timm's `feature_info` names, each checked against the trace; where that gives fewer than two,
    the values that every path from image to logits crosses, the last block of each resolution. A network of one width
    and resolution (ViT, Mixer) is cut into `groups` equal groups of blocks.
    """
    stages = _from_feature_info(tr)
    if len(stages) < 2:
        stages = _from_graph(tr) or stages
    uniform = len({(s.shape.grid, s.shape.channels) for s in stages}) == 1
    if uniform and len(stages) > groups:
        stages = [stages[round((i + 1) * len(stages) / groups) - 1] for i in range(groups)]
    return [_deepen(tr, s) for s in stages]


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """timm's table of stages; empty for models of other libraries."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    return list(info) if isinstance(info, (list, tuple)) else []


def _from_feature_info(tr: Trace) -> list[Stage]:
    found: dict[Value, Stage] = {}
    for entry in feature_info(tr.model):
        name = _called(tr, entry.get("module", ""))
        stage = stage_at(tr, name, entry.get("num_chs")) if name else None
        if stage is not None:
            found.setdefault(stage.value, stage)
    return sorted(found.values(), key=lambda s: s.left)


def _called(tr: Trace, name: str) -> str | None:
    """`name`, or its last called descendant where it is a container that is iterated and not called."""
    modules = dict(tr.model.named_modules())
    while name and name in modules and name not in tr.calls:
        children = list(modules[name]._modules)
        if not isinstance(modules[name], CONTAINERS) or not children:
            return None
        name = f"{name}.{children[-1]}"
    return name if name and name in modules else None


def _from_graph(tr: Trace) -> list[Stage]:
    """Dominator values that are outputs of building blocks; the last block of each run of equal resolution."""
    modules = dict(tr.model.named_modules())
    found: dict[Value, Stage] = {}
    for name in tr.calls:
        parents = [name[:i] for i, c in enumerate(name) if c == "."]
        if not name or not all(isinstance(modules[p], CONTAINERS) for p in parents):
            continue
        stage = stage_at(tr, name)
        if stage and stage.cut and stage.shape.layout != "NC" and math.prod(stage.shape.grid) > 1:
            old = found.get(stage.value)
            if old is None or _is_leaf(modules[old.name]):
                found[stage.value] = stage
    runs: list[list[Stage]] = []
    for stage in sorted(found.values(), key=lambda s: s.left):
        if runs and runs[-1][-1].shape.grid == stage.shape.grid:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    ends = [([s for s in run if not _is_leaf(modules[s.name])] or run)[-1] for run in runs]
    if len(ends) > 2:
        return ends
    siblings = _numbered_siblings(tr, modules)
    return siblings if len(siblings) >= 4 else ends


def _numbered_siblings(tr: Trace, modules: dict[str, nn.Module]) -> list[Stage]:
    """The longest series blocks.0, blocks.1, ... of one shape, at any depth: a ViT's blocks inside its encoder."""
    series: dict[tuple, list[Stage]] = defaultdict(list)
    for name in tr.calls:
        parent, _, last = name.rpartition(".")
        stem = last.rstrip("0123456789")
        if stem != last and not _is_leaf(modules[name]):
            stage = stage_at(tr, name)
            if stage and stage.cut:
                series[parent, stem, tuple(stage.shape)].append(stage)
    longest: list[Stage] = max(series.values(), key=lambda s: len(s), default=[])
    return sorted(longest, key=lambda s: s.left)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _deepen(tr: Trace, stage: Stage) -> Stage:
    """The last block and not the Sequential around it (same value): gradient checkpointing bypasses the Sequential."""
    modules = dict(tr.model.named_modules())
    name = stage.name
    while isinstance(modules[name], nn.Sequential) and len(modules[name]):
        inner = f"{name}.{list(modules[name]._modules)[-1]}"
        call = tr.once(inner)
        if call is None or not call.bare or call.values != [stage.value]:
            break
        name = inner
    return Stage(name, stage.shape, stage.stride, stage.cut, stage.left, stage.value)


def chain(tr: Trace, start: Stage, end: Stage) -> list[str] | None:
    """Names of called modules that lead from the output of `start` to the output of `end`, each fed with nothing but
    what the one before returned; None when anything else happens in between. Such a stage can be run alone."""
    first = tr.once(start.name)
    assert first is not None
    takers: dict[Value, list[Call]] = defaultdict(list)
    for calls in tr.calls.values():
        call = calls[0]
        if len(calls) == 1 and call.plain and call.bare and len(call.inputs) == 1 and len(call.values) == 1:
            if call.name and call.left <= end.left and call.values[0] != call.inputs[0]:
                takers[call.inputs[0]].append(call)

    def search(value: Value, depth: int) -> list[str] | None:
        if value == end.value:
            return []
        if depth > 500:
            return None
        for call in sorted(takers[value], key=lambda c: c.entered - c.left):  # the outermost module first
            rest = search(call.values[0], depth + 1)
            if rest is not None:
                return [call.name, *rest]
        return None

    return search(start.value, 0)


def pair_stages(student: list[Stage], teacher: list[Stage]) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage), 1-based, monotone, last with last, as many as the shorter network has.

    Dynamic programming on |log2 of the stride ratio| + |difference of relative depth|.
    """
    many_s, many_t = len(student), len(teacher)
    count = min(many_s, many_t)
    if not count:
        return []

    def cost(i: int, j: int) -> float:
        strides = abs(math.log2(student[i].stride / teacher[j].stride))
        return strides + abs((i + 1) / many_s - (j + 1) / many_t)

    best: dict[tuple[int, int, int], tuple[float, tuple[int, int] | None]] = {}
    for k in range(count):
        for i in range(k, many_s):
            for j in range(k, many_t):
                if k == 0:
                    best[k, i, j] = (cost(i, j), None)
                    continue
                options = [(best[k - 1, a, b][0], (a, b)) for a in range(k - 1, i) for b in range(k - 1, j)]
                before, where = min(options)
                best[k, i, j] = (before + cost(i, j), where)
    place: tuple[int, int] | None = (many_s - 1, many_t - 1)
    pairs = []
    for k in reversed(range(count)):
        assert place is not None
        pairs.append((place[0] + 1, place[1] + 1))
        place = best[k, place[0], place[1]][1]
    return pairs[::-1]
