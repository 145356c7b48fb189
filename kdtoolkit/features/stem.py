"""The stem of a network: what runs in front of its first stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.features.boundary_finder import find_boundary
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import StageBoundary


def find_stem(trace: ModelTrace, stages: Sequence[StageBoundary]) -> StageBoundary | None:
    """Find the end of a network's stem, which is what its first stage takes.

    Args:
        trace: Trace of the model.
        stages: The ends of its stages, shallow to deep.

    Returns:
        The boundary in front of the first stage; None where the first stage takes the image itself,
        is no module of its own, or takes a value that cannot be replaced.
    """
    if not stages:
        return None
    for call in _calls_around(trace, stages[0].main.module):
        if len(call.inputs) != 1:
            continue
        stem = _boundary_that_returns(trace, call.inputs[0], call.called_at)
        if stem is not None:
            return stem
    return None


def _calls_around(trace: ModelTrace, module: str) -> Iterator[ModuleCall]:
    """Calls of the modules that hold the end of the first stage, from the outermost inwards.

    A list of blocks that is iterated and not called begins with its first block.
    """
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        holder = trace.modules[name]
        if not holder._modules or all(p.dim() < 2 for p in holder.parameters()):
            return  # one layer or one norm; what it takes is inside the stage
        if name not in trace.calls:
            name = f"{name}.{next(iter(holder._modules))}"
        call = trace.single_call(name)
        if call is not None:
            yield call


def _boundary_that_returns(
    trace: ModelTrace, value: GraphValue, before: int
) -> StageBoundary | None:
    """The replaceable boundary of the last module that returned a value before a time."""
    returning = [
        call
        for calls in trace.calls.values()
        for call in calls
        if call.returned_at < before and value in call.output_values
    ]
    for call in sorted(returning, key=lambda call: call.returned_at, reverse=True):
        boundary = find_boundary(trace, call.name)
        if boundary is not None and boundary.replaceable and not boundary.overwritten:
            return boundary
    return None
