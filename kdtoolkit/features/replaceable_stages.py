"""Move the ends of stages to where their output can be replaced.

Networks whose blocks read the two blocks before them (NASNet) have stages that other paths lead
past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.features.blocks import building_blocks, parents_of, resolution_runs
from kdtoolkit.features.boundary_finder import find_boundary
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import BoundaryTensor, StageBoundary

MAX_JOINT_BLOCKS = 3  # most blocks whose outputs together end a stage


def make_replaceable(trace: ModelTrace, stages: Sequence[StageBoundary]) -> list[StageBoundary]:
    """Give each stage an end at which the network can be reset.

    Args:
        trace: Trace of the model.
        stages: The stages, shallow to deep.

    Returns:
        The stages with such an end, as far as there is one behind the stage before; the others as
        they were, unless they end where the stage before ends.
    """
    if all(stage.replaceable for stage in stages):
        blocks = []
    else:
        blocks = [block for run in resolution_runs(trace) for block in run]
    found: list[StageBoundary] = []
    for stage in stages:
        candidates = [stage] if stage.replaceable else _candidate_ends(trace, stage, blocks)
        previous = found[-1] if found else None
        later = [end for end in candidates if previous is None or _is_behind(end, previous)]
        found += later[:1]
    return found


def _candidate_ends(
    trace: ModelTrace, stage: StageBoundary, blocks: Sequence[StageBoundary]
) -> list[StageBoundary]:
    """A block earlier, several tensors, or the stage as it is."""
    earlier = [
        block
        for block in blocks
        if block.shape.grid == stage.shape.grid and block.returned_at <= stage.returned_at
    ]
    return [*earlier[-1:], *_find_joint_boundary(trace, stage), stage]


def _is_behind(end: StageBoundary, previous: StageBoundary) -> bool:
    is_later = end.returned_at > previous.returned_at
    return is_later and set(end.values) != set(previous.values)


def _find_joint_boundary(trace: ModelTrace, stage: StageBoundary) -> list[StageBoundary]:
    """The outputs of the last two or three blocks together, or nothing.

    An older output that a younger one of these blocks reads too is replaced only where later
    modules read it.
    """
    last_blocks = _last_blocks(trace, stage)
    for count in range(2, len(last_blocks) + 1):
        blocks = last_blocks[:count]
        joint = find_boundary(trace, [block.name for block in blocks], stride=stage.stride)
        if joint is not None and joint.replaceable:
            return [_with_consumers(trace, joint, blocks, stage)]
    return []


def _last_blocks(trace: ModelTrace, stage: StageBoundary) -> list[ModuleCall]:
    """The last blocks up to the end of a stage, one for each value, the last one first."""
    blocks: dict[GraphValue, ModuleCall] = {}
    for call in reversed(building_blocks(trace)):
        if call.returned_at <= stage.returned_at and len(call.outputs[0].shape) > 2:
            blocks.setdefault(call.output_values[0], call)
    return list(blocks.values())[:MAX_JOINT_BLOCKS]


def _with_consumers(
    trace: ModelTrace, joint: StageBoundary, blocks: Sequence[ModuleCall], stage: StageBoundary
) -> StageBoundary:
    """The joint boundary with the stage's feature as its main tensor, and with consumers."""
    read_inside = {value for block in blocks for value in block.inputs}
    tensors: list[BoundaryTensor] = []
    for tensor in joint.tensors:
        if tensor.value in read_inside:
            consumers = _find_consumers(trace, tensor.value, joint.returned_at)
            tensors.append(dataclasses.replace(tensor, consumers=consumers))
        else:
            tensors.append(tensor)
    own = [i for i, tensor in enumerate(tensors) if tensor.module == stage.main.module]
    same_value = [i for i in own if tensors[i].value in stage.values]
    main_index = [*same_value, *own, joint.main_index][0]
    stride = trace.x.shape[2] / tensors[main_index].shape.grid[0]
    return dataclasses.replace(joint, tensors=tuple(tensors), main_index=main_index, stride=stride)


def _find_consumers(trace: ModelTrace, value: GraphValue, after: int) -> tuple[str, ...]:
    """The outermost modules that are called later and read the value."""
    consumers = [
        name
        for name, calls in trace.calls.items()
        if name and any(call.called_at > after and value in call.inputs for call in calls)
    ]
    return tuple(name for name in consumers if not parents_of(name) & set(consumers))
