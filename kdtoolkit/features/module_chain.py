"""Stages that can be run alone, because they are called modules in a row."""

from __future__ import annotations

from collections import defaultdict

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import StageBoundary

MAX_CHAIN_LENGTH = 500


def find_module_chain(
    trace: ModelTrace, start: StageBoundary, end: StageBoundary
) -> list[str] | None:
    """Find called modules that lead from one boundary to another, each fed by the one before.

    Args:
        trace: Trace of the model.
        start: Where the first module begins.
        end: Where the last one ends.

    Returns:
        Their names; None where anything else happens in between. A stage that is such a chain can
        be run alone.
    """
    ends = (start, end)
    if any(len(boundary.tensors) > 1 or boundary.tensors[0].path for boundary in ends):
        return None
    goal = end.tensors[0].value
    readers = _chainable_calls(trace, end.returned_at)
    dead_ends: set[GraphValue] = set()  # values from which no chain leads to the goal

    def search(value: GraphValue, depth: int) -> list[str] | None:
        if value == goal:
            return []
        if depth > MAX_CHAIN_LENGTH or value in dead_ends:
            return None
        dead_ends.add(value)
        outermost_first = sorted(readers[value], key=lambda c: c.called_at - c.returned_at)
        for call in outermost_first:
            rest = search(call.output_values[0], depth + 1)
            if rest is not None:
                return [call.name, *rest]
        return None

    return search(start.tensors[0].value, 0)


def _chainable_calls(trace: ModelTrace, until: int) -> dict[GraphValue, list[ModuleCall]]:
    """Calls of modules that map one tensor to another and return by `until`, by what they read."""
    readers: dict[GraphValue, list[ModuleCall]] = defaultdict(list)
    for name in trace.calls:
        call = trace.single_call(name)
        if not name or call is None or call.returned_at > until:
            continue
        if not (call.takes_one_tensor and call.returns_tensor):
            continue
        if len(call.inputs) != 1 or len(call.outputs) != 1:
            continue
        if call.output_values[0] != call.inputs[0]:
            readers[call.inputs[0]].append(call)
    return readers
