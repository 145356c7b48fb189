"""From what a user calls a tap to the tensors that it reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdtoolkit.features.boundary_finder import find_boundary, unwrap_boundary, unwrap_sequential
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.stage_boundary import StageBoundary, split_tap_name
from kdtoolkit.utils.registry import suggestion


def stage_by_number(
    model: nn.Module, stages: Sequence[StageBoundary], number: int
) -> StageBoundary:
    """Look a stage up.

    Args:
        model: The model, for the message.
        stages: The ends of its stages, shallow to deep.
        number: The stage from 1, or from -1 for the last.

    Raises:
        ValueError: If there is no such stage.
    """
    if not stages or not 1 <= abs(number) <= len(stages):
        raise ValueError(
            f"{type(model).__name__} has {len(stages)} stages, stage {number} is none of them; "
            "give a number from 1 (or -1 for the last), or a module's name"
        )
    return stages[number - 1 if number > 0 else number]


def boundary_by_name(model: nn.Module, trace: ModelTrace, name: str) -> StageBoundary:
    """Find the boundary where a module returns.

    Args:
        model: The model.
        trace: Its trace.
        name: Name of the module, or of a member of what it returns ("stage3[1]").

    Raises:
        ValueError: If there is no such module, it does not run exactly once, or it returns no
            feature of the image.
    """
    module, path = split_tap_name(name)
    modules = dict(model.named_modules())
    if module not in modules:
        children = [child for child, _ in model.named_children()]
        hint = suggestion(module, [*children, *modules])
        raise ValueError(
            f"tap {name!r} is not a module of {type(model).__name__}; "
            f"its children: {', '.join(children)}{hint}"
        )
    if module not in trace.calls:
        module = unwrap_sequential(trace, module)
    calls = trace.calls.get(module, [])
    if len(calls) != 1:
        times = f"fired {len(calls)} times in one forward" if calls else "never fired"
        raise ValueError(f"tap {name!r} {times}: {_why_not_once(model, trace, module)}")
    boundary = find_boundary(trace, module + path)
    if boundary is None:
        raise _no_feature(trace, name, module, path)
    return unwrap_boundary(trace, boundary)


def _no_feature(trace: ModelTrace, name: str, module: str, path: str) -> ValueError:
    outputs = trace.calls[module][0].outputs
    members = ""
    if path and outputs:
        members = f"; it returns {', '.join(repr(output.path) for output in outputs)}"
    return ValueError(
        f"tap {name!r} returns no feature of the image: "
        f"shape {[output.shape for output in outputs]}{members}; expected (B, C, H, W), "
        f"(B, H, W, C), (B, L, C) or (B, C) ({_suggest_inside(trace, module)})"
    )


def _suggest_inside(trace: ModelTrace, module: str) -> str:
    """Modules inside a module that could be tapped."""
    inside = [
        name
        for name, calls in trace.calls.items()
        if name.startswith(f"{module}.") and calls[0].returns_tensor and len(calls) == 1
    ]
    if not inside:
        return "none inside returns one tensor"
    return "for instance " + ", ".join(repr(name) for name in inside[-3:])


def _why_not_once(model: nn.Module, trace: ModelTrace, module: str) -> str:
    if len(trace.calls.get(module, [])) > 1:
        return "the model uses it several times; tap a module that runs once"
    inside = _suggest_inside(trace, module)
    if isinstance(model.get_submodule(module), (nn.ModuleList, nn.ModuleDict)):
        return f"it is a list that the model iterates over and never calls; {inside}"
    return f"the model does not call it (fused or skipped); {inside}"
