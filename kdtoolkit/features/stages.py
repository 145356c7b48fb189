"""Where a traced network divides into stages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.features.blocks import (
    CONTAINERS,
    block_boundaries,
    numbered_siblings,
    resolution_runs,
)
from kdtoolkit.features.boundary_finder import find_boundary, unwrap_boundary
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.replaceable_stages import make_replaceable
from kdtoolkit.features.stage_boundary import StageBoundary


def find_stages(trace: ModelTrace, groups: int = 4) -> list[StageBoundary]:
    """Find the stages of a network.

    First the places that timm's `feature_info` names, each checked against the trace. Where that
    gives fewer than two, the values that every path from the image to the logits passes: the last
    block of each resolution. A run of blocks of one width and resolution (ViT, Mixer) is divided
    into equal groups. A stage that other paths lead past ends a block earlier, or in several
    tensors; where neither helps it keeps its tap and cannot be reset.

    Args:
        trace: Trace of the model.
        groups: Number of groups that a run of equal blocks is divided into.

    Returns:
        The ends of the stages, shallow to deep.
    """
    stages, missing_strides = _stages_from_table(trace)
    if len(stages) < 2:
        stages = _stages_from_graph(trace) or stages
    elif missing_strides or _is_uniform(stages):
        stages = _complete_table(trace, stages, missing_strides)
    stages = make_replaceable(trace, _group_equal_blocks(stages, groups))
    return [unwrap_boundary(trace, stage) for stage in stages]


def _stages_from_table(trace: ModelTrace) -> tuple[list[StageBoundary], list[float]]:
    """Stages that the model's own table names, and the strides of entries that are not there."""
    found: dict[tuple[GraphValue, ...], StageBoundary] = {}
    missing_strides = []
    for entry in trace.stage_table:
        name, stride = _find_called_module(trace, entry["module"]), entry.get("reduction")
        stage = find_boundary(trace, name, entry.get("num_chs"), stride) if name else None
        if stage is not None and not stage.overwritten:
            found.setdefault(tuple(stage.values), stage)
        elif stride:
            missing_strides.append(float(stride))
    return sorted(found.values(), key=lambda stage: stage.returned_at), missing_strides


def _find_called_module(trace: ModelTrace, name: str) -> str | None:
    """The called module that a table's entry means.

    It is `name`, or the only module whose name ends so, or its last called descendant where it is a
    container that is iterated and not called.
    """
    if name and name not in trace.modules:
        depth = name.count(".") + 1
        longer = [n for n in trace.modules if n.endswith(f".{name}") and n.count(".") == depth]
        name = longer[0] if len(longer) == 1 else ""
    while name and name not in trace.calls:
        module = trace.modules[name]
        if not isinstance(module, CONTAINERS) or not module._modules:
            return None
        name = f"{name}.{list(module._modules)[-1]}"
    return name or None


def _stages_from_graph(trace: ModelTrace) -> list[StageBoundary]:
    """The last block of each resolution, or a series of equal blocks where these are few."""
    last_blocks = [run[-1] for run in resolution_runs(trace)]
    if len(last_blocks) > 2:
        return last_blocks
    siblings = numbered_siblings(trace)
    fewest = 4 if len(last_blocks) > 1 else 2
    return siblings if len(siblings) >= fewest else last_blocks


def _is_uniform(stages: Sequence[StageBoundary]) -> bool:
    """Whether all stages have one resolution and width."""
    return len({(stage.shape.grid, stage.shape.channels) for stage in stages}) == 1


def _group_equal_blocks(stages: list[StageBoundary], groups: int) -> list[StageBoundary]:
    """Divide a run of more than `groups` blocks of one width and resolution into that many."""
    runs: dict[tuple[tuple[int, int], int], list[StageBoundary]] = defaultdict(list)
    for stage in stages:
        runs[stage.shape.grid, stage.shape.channels].append(stage)
    longest: list[StageBoundary] = max(runs.values(), key=len, default=[])
    if len(longest) <= groups or 2 * len(longest) < len(stages):
        return stages
    kept = [longest[round((i + 1) * len(longest) / groups) - 1] for i in range(groups)]
    return [stage for stage in stages if stage not in longest or stage in kept]


def _complete_table(
    trace: ModelTrace, stages: list[StageBoundary], missing_strides: Sequence[float]
) -> list[StageBoundary]:
    """Add what the table leaves out.

    These are strides whose entry is not there and, in front of a transformer, convolutional stages
    of several blocks.
    """
    wanted = set(missing_strides)
    if _is_uniform(stages):
        strides = {b.values[0]: b.stride for b in block_boundaries(trace)}
        counts = Counter(strides.values())
        wanted |= {s for s, count in counts.items() if count > 1 and s < stages[0].stride}
    wanted -= {stage.stride for stage in stages}
    last_blocks = [run[-1] for run in resolution_runs(trace)]
    added = [
        block
        for block in last_blocks
        if block.stride in wanted and block.returned_at < stages[-1].returned_at
    ]
    return sorted([*added, *stages], key=lambda stage: stage.returned_at)
