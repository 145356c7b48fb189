"""Where a traced network can be cut into stages."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from typing import Any, TypeGuard

from torch import nn

from kdtoolkit.features.stage_boundary import StageBoundary, deepened, stage_at
from kdtoolkit.features.tracing import Call, Trace, Value

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
FRONTIER = 3  # most blocks whose outputs together end a stage


def find_stages(tr: Trace, groups: int = 4) -> list[StageBoundary]:
    """The stages of a network, shallow to deep.

    First the places that timm's `feature_info` names, each checked against the trace; where that gives fewer than two,
    the values that every path from image to logits crosses, the last block of each resolution. A run of blocks of one
    width and resolution (ViT, Mixer) is cut into `groups` equal groups. A stage that other paths lead past ends a block
    earlier, or in several tensors; where neither helps it keeps its tap and cannot be reset.
    """
    stages, missing = _from_table(tr, tr.table)
    if len(stages) < 2:
        stages = _from_graph(tr) or stages
    elif missing or _uniform(stages):
        stages = _complete(tr, stages, missing)
    return [deepened(tr, s) for s in _cuts(tr, _grouped(stages, groups))]


def _from_table(tr: Trace, table: list[dict[str, Any]]) -> tuple[list[StageBoundary], list[float]]:
    """Stages that a table names, and the strides of those of its entries that are not there."""
    found: dict[tuple[Value, ...], StageBoundary] = {}
    missing = []
    for entry in table:
        name, stride = _called(tr, entry["module"]), entry.get("reduction")
        stage = stage_at(tr, name, entry.get("num_chs"), stride) if name else None
        if stage is not None and not stage.overwritten:
            found.setdefault(tuple(stage.values), stage)
        elif stride:
            missing.append(float(stride))
    return sorted(found.values(), key=lambda s: s.left), missing


def _called(tr: Trace, name: str) -> str | None:
    """`name`, or the only module whose name ends so, or its last called descendant where it is a container that is
    iterated and not called."""
    modules = dict(tr.model.named_modules())
    if name and name not in modules:
        longer = [
            n for n in modules if n.endswith("." + name) and n.count(".") == name.count(".") + 1
        ]
        name = longer[0] if len(longer) == 1 else ""
    while name and name not in tr.calls:
        children = list(modules[name]._modules)
        if not isinstance(modules[name], CONTAINERS) or not children:
            return None
        name = f"{name}.{children[-1]}"
    return name or None


def _uniform(stages: list[StageBoundary]) -> bool:
    return len({(s.shape.grid, s.shape.channels) for s in stages}) == 1


def _grouped(stages: list[StageBoundary], groups: int) -> list[StageBoundary]:
    """Stages with every run of more than `groups` blocks of one width and resolution cut into that many."""
    runs: dict[tuple, list[StageBoundary]] = defaultdict(list)
    for stage in stages:
        runs[stage.shape.grid, stage.shape.channels].append(stage)
    longest = max(runs.values(), key=len, default=[])
    if len(longest) <= groups or 2 * len(longest) < len(stages):
        return stages
    ends = [longest[round((i + 1) * len(longest) / groups) - 1] for i in range(groups)]
    return [s for s in stages if s not in longest or s in ends]


def _complete(tr: Trace, stages: list[StageBoundary], missing: list[float]) -> list[StageBoundary]:
    """What the table leaves out: strides whose entry is not there, and, of a transformer, the convolutional stages
    of several blocks in front of it."""
    have = {s.stride for s in stages}
    wanted = set(missing)
    if _uniform(stages):
        blocks = {s.values[0]: s.stride for s in _block_ends(tr, dict(tr.model.named_modules()))}
        several = {stride for stride, count in Counter(blocks.values()).items() if count > 1}
        wanted |= {stride for stride in several if stride < stages[0].stride}
    more = [
        run[-1]
        for run in _runs(tr)
        if run[-1].stride in wanted - have and run[-1].left < stages[-1].left
    ]
    return sorted([*more, *stages], key=lambda s: s.left)


# ------------------------------------------------------------------------------------------------------------ the graph
def _units(tr: Trace) -> list[Call]:
    """The building blocks, in the order in which they return: modules that run once, with nothing above them but
    containers and modules through which the resolution changes more than once (a backbone, a convolutional stem)."""
    modules = dict(tr.model.named_modules())
    open_ = {""} | {n for n, m in modules.items() if isinstance(m, CONTAINERS)} | _wide(tr, modules)
    units = []
    for name in tr.calls:
        call = tr.once(name)
        parents = [name[:i] for i, c in enumerate(name) if c == "."]
        if name and call is not None and call.values and all(p in open_ for p in parents):
            units.append(call)
    return sorted(units, key=lambda c: (c.left, -len(c.name)))


def _wide(tr: Trace, modules: dict[str, nn.Module]) -> set[str]:
    """Modules inside of which whole blocks end at two or more resolutions that they were not given."""
    ends, wide = _block_ends(tr, modules), set()
    for name in tr.calls:
        call = tr.once(name)
        if name and call is not None:
            given = [s.shape.grid for s in ends if s.left < call.entered][-1:]
            inside = {s.shape.grid for s in ends if s.parts[0].module.startswith(name + ".")}
            if len(inside.difference(given)) >= 2:
                wide.add(name)
    return wide


def _block_ends(tr: Trace, modules: dict[str, nn.Module]) -> list[StageBoundary]:
    """Modules with children at whose output the network can be cut, in the order in which they return."""
    names = [n for n in tr.calls if n and not _is_leaf(modules[n])]
    return sorted(
        (s for n in names if _is_end(s := stage_at(tr, n)) and not s.parts[1:]),
        key=lambda s: s.left,
    )


def _runs(tr: Trace) -> list[list[StageBoundary]]:
    """Ends of building blocks that every path crosses, in runs of about equal resolution; leaves only where a run has
    nothing else."""
    modules = dict(tr.model.named_modules())
    learned = min((c[0].left for n, c in tr.calls.items() if modules[n]._parameters), default=0)
    found: dict[Value, StageBoundary] = {}
    for call in _units(tr):
        stage = stage_at(tr, call.name) if len(call.values) == 1 and call.left >= learned else None
        if _is_end(stage) and stage.shape.layout != "NC" and math.prod(stage.shape.grid) > 1:
            old = found.get(stage.values[0])
            if old is None or _is_leaf(modules[old.parts[0].module]):
                found[stage.values[0]] = stage
    runs: list[list[StageBoundary]] = []
    for stage in sorted(found.values(), key=lambda s: s.left):
        if (
            runs and abs(math.log2(runs[-1][-1].stride / stage.stride)) < 0.5
        ):  # convolutions without padding trim a bit
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return [[s for s in run if not _is_leaf(modules[s.parts[0].module])] or run for run in runs]


def _from_graph(tr: Trace) -> list[StageBoundary]:
    ends = [run[-1] for run in _runs(tr)]
    if len(ends) > 2:
        return ends
    siblings = _numbered_siblings(tr)
    return siblings if len(siblings) >= (4 if len(ends) > 1 else 2) else ends


def _numbered_siblings(tr: Trace) -> list[StageBoundary]:
    """The longest series blocks.0, blocks.1, ... of one shape, at any depth: a ViT's blocks inside its encoder."""
    modules = dict(tr.model.named_modules())
    series: dict[tuple, list[StageBoundary]] = defaultdict(list)
    for name in tr.calls:
        stem = re.sub(r"\d+$", "", name)
        if stem != name and not _is_leaf(modules[name]):
            stage = stage_at(tr, name)
            if _is_end(stage):
                series[stem, tuple(stage.shape)].append(stage)
    longest: list[StageBoundary] = max(series.values(), key=lambda s: len(s), default=[])
    return sorted(longest, key=lambda s: s.left)


def _is_end(stage: StageBoundary | None) -> TypeGuard[StageBoundary]:
    return stage is not None and stage.cut and not stage.overwritten


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


# ----------------------------------------------------------------------------------------------------------------- cuts
def _cuts(tr: Trace, stages: list[StageBoundary]) -> list[StageBoundary]:
    """Each stage with an end where the network can be cut, as far as there is one behind the stage before."""
    found: list[StageBoundary] = []
    runs = [] if all(stage.cut for stage in stages) else _runs(tr)
    for stage in stages:
        ends = [stage]
        if not stage.cut:
            same = [
                s
                for run in runs
                for s in run
                if s.shape.grid == stage.shape.grid and s.left <= stage.left
            ]
            ends = [*same[-1:], *_frontier(tr, stage), stage]
        later = [
            e
            for e in ends
            if not found or (e.left > found[-1].left and set(e.values) != set(found[-1].values))
        ]
        found += later[:1]
    return found


def _frontier(tr: Trace, stage: StageBoundary) -> list[StageBoundary]:
    """The outputs of the last two or three blocks together, for networks whose blocks take the two before them. An
    older output that a younger block of these takes too is replaced only where later modules take it."""
    blocks: dict[Value, Call] = {}
    for call in reversed([c for c in _units(tr) if c.left <= stage.left and len(c.shapes[0]) > 2]):
        blocks.setdefault(call.values[0], call)
    last = list(blocks.values())[:FRONTIER]
    for count in range(2, len(last) + 1):
        calls = last[:count]
        end = stage_at(tr, [c.name for c in calls], stride=stage.stride)
        if end is not None and end.cut:
            taken = {v for c in calls for v in c.inputs}
            parts = tuple(
                dataclasses.replace(p, takers=_takers(tr, p.value, end.left))
                if p.value in taken
                else p
                for p in end.parts
            )
            own = [i for i, p in enumerate(parts) if p.module == stage.parts[stage.main].module]
            main = next((i for i in own if parts[i].value in stage.values), (own or [end.main])[0])
            step = tr.x.shape[2] / parts[main].shape.grid[0]
            return [dataclasses.replace(end, parts=parts, main=main, stride=step)]
    return []


def _takers(tr: Trace, value: Value, after: int) -> tuple[str, ...]:
    """The outermost modules that are entered later and take the value."""
    takers = [
        n
        for n, calls in tr.calls.items()
        if n and any(c.entered > after and value in c.inputs for c in calls)
    ]
    return tuple(n for n in takers if not any(n.startswith(other + ".") for other in takers))
