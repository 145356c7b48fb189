"""Building blocks of a network, found in its trace: where they end, and at which resolution."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TypeGuard

from torch import nn

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.features.boundary_finder import find_boundary
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import StageBoundary

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SAME_RESOLUTION = 0.5  # octaves; convolutions without padding trim a bit


def building_blocks(trace: ModelTrace) -> list[ModuleCall]:
    """The calls of the building blocks, in the order in which they return.

    A block runs once. Above it are only containers, and modules through which the resolution
    changes more than once (a backbone, a convolutional stem).

    Args:
        trace: Trace of the model.

    Returns:
        The calls; where several return at the same time, the one with the longest name first.
    """
    transparent = {name for name, module in trace.modules.items() if isinstance(module, CONTAINERS)}
    transparent |= {"", *_multi_resolution_modules(trace)}
    blocks = []
    for name in trace.calls:
        call = trace.single_call(name)
        if name and call is not None and call.outputs and parents_of(name) <= transparent:
            blocks.append(call)
    return sorted(blocks, key=lambda call: (call.returned_at, -len(call.name)))


def parents_of(name: str) -> set[str]:
    """The modules that a module lies in, without the model: "a.b.c" -> {"a", "a.b"}.

    Args:
        name: Full name of a module.

    Returns:
        Full names of the modules around it; empty for a child of the model.
    """
    return {name[:index] for index, character in enumerate(name) if character == "."}


def _multi_resolution_modules(trace: ModelTrace) -> set[str]:
    """Modules inside of which blocks end at two or more resolutions that they were not given."""
    boundaries = block_boundaries(trace)
    found = set()
    for name in trace.calls:
        call = trace.single_call(name)
        if not name or call is None:
            continue
        earlier = [b.shape.grid for b in boundaries if b.returned_at < call.called_at]
        inside = {b.shape.grid for b in boundaries if b.tensors[0].module.startswith(f"{name}.")}
        if len(inside.difference(earlier[-1:])) >= 2:
            found.add(name)
    return found


def block_boundaries(trace: ModelTrace) -> list[StageBoundary]:
    """Ends of modules with children at which the network can be reset, in the order of return.

    Args:
        trace: Trace of the model.

    Returns:
        The boundaries that consist of one tensor each.
    """
    names = [name for name in trace.calls if name and not is_leaf(trace.modules[name])]
    boundaries = (find_boundary(trace, name) for name in names)
    single = [b for b in boundaries if can_end_stage(b) and len(b.tensors) == 1]
    return sorted(single, key=lambda boundary: boundary.returned_at)


def resolution_runs(trace: ModelTrace) -> list[list[StageBoundary]]:
    """Ends of building blocks that every path passes, in runs of about equal resolution.

    Modules without children count only where a run has nothing else.

    Args:
        trace: Trace of the model.

    Returns:
        The runs, and the ends in each of them, in the order of return.
    """
    runs: list[list[StageBoundary]] = []
    for boundary in _block_ends_by_value(trace):
        last = runs[-1][-1] if runs else None
        is_same = last is not None and _octaves(last, boundary) < SAME_RESOLUTION
        if is_same:
            runs[-1].append(boundary)
        else:
            runs.append([boundary])
    return [_without_leaves(trace, run) or run for run in runs]


def _octaves(one: StageBoundary, other: StageBoundary) -> float:
    return abs(math.log2(one.stride / other.stride))


def _block_ends_by_value(trace: ModelTrace) -> list[StageBoundary]:
    """One block for each value at which blocks end; one with children where there is one."""
    first_learned = min(
        (
            calls[0].returned_at
            for name, calls in trace.calls.items()
            if trace.modules[name]._parameters
        ),
        default=0,
    )
    found: dict[GraphValue, StageBoundary] = {}
    for call in building_blocks(trace):
        if len(call.outputs) != 1 or call.returned_at < first_learned:
            continue
        boundary = find_boundary(trace, call.name)
        if not can_end_stage(boundary) or boundary.shape.layout == "NC":
            continue
        if math.prod(boundary.shape.grid) <= 1:
            continue
        known = found.get(boundary.values[0])
        if known is None or is_leaf(trace.modules[known.tensors[0].module]):
            found[boundary.values[0]] = boundary
    return sorted(found.values(), key=lambda boundary: boundary.returned_at)


def _without_leaves(trace: ModelTrace, run: list[StageBoundary]) -> list[StageBoundary]:
    return [b for b in run if not is_leaf(trace.modules[b.tensors[0].module])]


def numbered_siblings(trace: ModelTrace) -> list[StageBoundary]:
    """The longest series blocks.0, blocks.1, ... of one shape, at any depth, as a ViT's blocks.

    Args:
        trace: Trace of the model.

    Returns:
        The ends of its modules in the order of return; empty where there is no such series.
    """
    series: dict[tuple[str, tuple[int, ...]], list[StageBoundary]] = defaultdict(list)
    for name in trace.calls:
        stem = re.sub(r"\d+$", "", name)
        if stem == name or is_leaf(trace.modules[name]):
            continue
        boundary = find_boundary(trace, name)
        if can_end_stage(boundary):
            series[stem, tuple(boundary.shape)].append(boundary)
    longest: list[StageBoundary] = max(series.values(), key=len, default=[])
    return sorted(longest, key=lambda boundary: boundary.returned_at)


def can_end_stage(boundary: StageBoundary | None) -> TypeGuard[StageBoundary]:
    """Whether the network can be reset at a boundary, and its feature read there.

    Args:
        boundary: A boundary, or None where none was found.

    Returns:
        True where it can be replaced and is not overwritten in place; False for None.
    """
    return boundary is not None and boundary.replaceable and not boundary.overwritten


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children.

    Args:
        module: Any module.

    Returns:
        True where it has none.
    """
    return next(module.children(), None) is None
