"""Find the tensors that leave a stage, from the modules that end it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from torch import nn

from kdtoolkit.features.autograd_graph import GraphValue, is_reachable, is_read
from kdtoolkit.features.feature_layout import infer_shape
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import BoundaryTensor, StageBoundary, split_tap_name
from kdtoolkit.types import Shape

# How unlike a stage's feature a tensor is (the unit is one octave of resolution).
WRONG_CHANNELS = 10.0
UNUSUAL_LAYOUT = 5.0


def find_boundary(
    trace: ModelTrace,
    names: str | Iterable[str],
    channels: int | None = None,
    stride: float | None = None,
) -> StageBoundary | None:
    """Find the boundary where some modules return.

    Args:
        trace: Trace of the model.
        names: The modules: "stages.2", or "stage2[1]" for a member of a tuple.
        channels: Channels of the feature; default what the model's own table says.
        stride: Image height over feature height, where a table says it.

    Returns:
        The boundary; None unless each module runs once and returns a feature of the image.
    """
    taps = [split_tap_name(name) for name in ([names] if isinstance(names, str) else names)]
    if channels is None and len(taps) == 1:
        channels = _channels_in_table(trace, taps[0][0])
    tensors: list[BoundaryTensor] = []
    overwritten = False
    for module, path in taps:
        call = trace.single_call(module)
        if call is None:
            return None
        overwritten |= call.overwritten
        returned = _returned_tensors(trace, call, channels, stride)
        tensors += [tensor for tensor in returned if path in ("", tensor.path)]
    if not tensors:
        return None

    distances = [_distance_to_feature(trace, t.shape, channels, stride) for t in tensors]
    main = tensors[distances.index(min(distances))]
    replaceable = _is_on_every_path(trace, [tensor.value for tensor in tensors])
    if replaceable and len(tensors) > 1:
        read = _find_read_tensors(trace, tensors)
        tensors = [tensor for tensor in tensors if tensor in read or tensor is main]
        main_index = tensors.index(main)
        tensors = [dataclasses.replace(tensor, is_read=tensor in read) for tensor in tensors]
    else:
        main_index = tensors.index(main)
    stride = trace.x.shape[2] / main.shape.grid[0]
    return StageBoundary(tuple(tensors), main_index, stride, replaceable, overwritten)


def _channels_in_table(trace: ModelTrace, module: str) -> int | None:
    return next((e.get("num_chs") for e in trace.stage_table if e["module"] == module), None)


def _returned_tensors(
    trace: ModelTrace, call: ModuleCall, channels: int | None, stride: float | None
) -> list[BoundaryTensor]:
    """The tensors of a module's output; empty where one of them is no feature of the image."""
    tensors = []
    for output in call.outputs:
        # what a table says is said of one of several
        is_described = len(call.outputs) == 1 or channels in output.shape[1:]
        shape = infer_shape(
            trace,
            output.shape,
            channels if is_described else None,
            stride if is_described else None,
            call.name,
        )
        if shape is None:
            return []
        tensors.append(
            BoundaryTensor(
                call.name, output.path, output.leaf_index, shape, output.value, call.returned_at
            )
        )
    return tensors


def _distance_to_feature(
    trace: ModelTrace, shape: Shape, channels: int | None, stride: float | None
) -> float:
    """How unlike the stage's feature a tensor is; the nearest is the feature."""
    distance = 0.0
    if channels not in (None, shape.channels):
        distance += WRONG_CHANNELS
    if shape.layout in ("NC", "NCL", "windows"):
        distance += UNUSUAL_LAYOUT
    if stride:
        distance += abs(math.log2(trace.x.shape[2] / shape.grid[0] / stride))
    return distance


def _is_on_every_path(trace: ModelTrace, values: Sequence[GraphValue]) -> bool:
    """Whether every path from the image to the logits passes one of the values."""
    if len(values) == 1:
        return values[0] in trace.dominators
    return not is_reachable(trace.logits, trace.x, values)


def _find_read_tensors(
    trace: ModelTrace, tensors: Sequence[BoundaryTensor]
) -> list[BoundaryTensor]:
    """The tensors that something later reads.

    One that could be left out because another makes up for it must stay: what is computed from it
    inside the module would not be replaced.
    """
    kept = list(tensors)
    for tensor in tensors:
        others = [other.value for other in kept if other is not tensor]
        if others and not is_read(trace.logits, tensor.value, others):
            kept.remove(tensor)
    return kept


def unwrap_boundary(trace: ModelTrace, boundary: StageBoundary) -> StageBoundary:
    """The same boundary with each module as the last one inside it that returns the same.

    Args:
        trace: Trace of the model.
        boundary: The boundary; it is not changed.

    Returns:
        A copy with other names of modules, and the times at which those return.
    """
    tensors = tuple(_unwrap_tensor(trace, tensor) for tensor in boundary.tensors)
    return dataclasses.replace(boundary, tensors=tensors)


def _unwrap_tensor(trace: ModelTrace, tensor: BoundaryTensor) -> BoundaryTensor:
    call = trace.single_call(unwrap_sequential(trace, tensor.module))
    if call is None:
        return tensor
    return dataclasses.replace(tensor, module=call.name, returned_at=call.returned_at)


def unwrap_sequential(trace: ModelTrace, name: str) -> str:
    """The last block of a Sequential in place of the Sequential, as far as both return the same.

    Gradient checkpointing, and some models, call the blocks of a Sequential and not itself.

    Args:
        trace: Trace of the model.
        name: Full name of any module.

    Returns:
        Full name of the block; `name` itself where the module is no Sequential, or its last block
        does not run exactly once or returns something else.
    """
    while isinstance(trace.modules[name], nn.Sequential) and len(trace.modules[name]._modules):
        last = f"{name}.{list(trace.modules[name]._modules)[-1]}"
        inner, outer = trace.single_call(last), trace.single_call(name)
        if inner is None:
            break
        if name in trace.calls and (outer is None or inner.output_values != outer.output_values):
            break
        name = last
    return name
