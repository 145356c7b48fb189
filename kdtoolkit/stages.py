"""Where a traced network can be cut into stages, which of them can be run alone, and how those of two networks pair."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from .trace import Call, Trace, Value
from .types import Shape

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
