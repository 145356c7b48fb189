"""Cut a network at the end of a stage: what lies in front of the cut, and what behind it.

Everything in front of the cut is the *trunk*, everything behind it the *tail*.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.models.layer_groups import modules_up_to, parameters_up_to
from kdtoolkit.types import TapKey
from kdtoolkit.utils.validation import describe_value, plain_scalar


class Cut(NamedTuple):
    """The two sides of the end of a stage, by names of modules and parameters.

    Attributes:
        trunk: Modules whose calls are over when the stage ends, with all modules inside them.
        tail: The outermost modules that are called after the stage.
        mixed: All other modules: those that hold modules or parameters of both sides.
        trunk_parameters: Parameters of the trunk that mixed modules hold themselves.
        tail_parameters: Parameters of the tail that mixed modules hold themselves.
    """

    trunk: list[str]
    tail: list[str]
    mixed: list[str]
    trunk_parameters: list[str]
    tail_parameters: list[str]


def cut_network(taps: Taps, stage: TapKey) -> Cut:
    """Find the two sides of a cut.

    Args:
        taps: The network.
        stage: Number of a stage from 1, or a tap: the cut lies at its end.

    Returns:
        What lies in front of the cut and behind it.

    Raises:
        ValueError: If the network cannot be run from the output of this stage alone.
    """
    taps.check_replaceable(stage)
    errors = taps.find_reset_errors([stage])
    if errors:
        raise ValueError(
            f"{type(taps.model).__name__} cannot be run from {stage!r} on: {'; '.join(errors)}; "
            "choose another cut"
        )
    model = taps.model
    modules = dict(model.named_modules())
    trunk = modules_up_to(taps, stage)
    before = {id(model.get_parameter(name)) for name in parameters_up_to(taps, stage)}
    after = _modules_after(taps, taps.boundary_of(stage).returned_at, trunk, before)
    mixed = [name for name in modules if name not in after and name not in set(trunk)]
    own = [
        join_names(name, parameter)
        for name in mixed
        for parameter, value in modules[name]._parameters.items()
        if value is not None
    ]
    return Cut(
        trunk=trunk,
        tail=[name for name in modules if name in after and name.rpartition(".")[0] not in after],
        mixed=mixed,
        trunk_parameters=[name for name in own if id(model.get_parameter(name)) in before],
        tail_parameters=[name for name in own if id(model.get_parameter(name)) not in before],
    )


def _modules_after(
    taps: Taps, position: int, trunk: list[str], parameters_before: set[int]
) -> set[str]:
    """Modules of which nothing is called or read up to a position of the traced forward."""
    modules = dict(taps.model.named_modules())
    before = {id(modules[name]) for name in trunk}
    for name, calls in taps.trace.calls.items():
        if any(call.called_at <= position for call in calls):
            before.add(id(modules[name]))

    def is_after(module: nn.Module) -> bool:
        if any(id(inner) in before for inner in module.modules()):
            return False
        return not any(id(p) in parameters_before for p in module.parameters())

    return {name for name, module in modules.items() if is_after(module)}


def tail_parameters(net: nn.Module, cut: Cut) -> dict[str, nn.Parameter]:
    """Return the parameters behind a cut, by name.

    Args:
        net: The network that was cut, or another of the same architecture.
        cut: The cut.

    Returns:
        Name -> parameter, in the order of the network.
    """
    inside = tuple(f"{name}." for name in cut.tail)
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if name.startswith(inside) or name in cut.tail_parameters
    }


def find_last_cut(taps: Taps) -> TapKey:
    """Find the deepest stage but the last at whose end the network can be cut.

    Args:
        taps: The network.

    Returns:
        The number of the stage.

    Raises:
        ValueError: If there is none.
    """
    for stage in range(len(taps.stages) - 1, 0, -1):
        boundary = taps.boundary_of(stage)
        if not boundary.replaceable or boundary.overwritten:
            continue
        if not taps.find_reset_errors([stage]):
            return stage
    raise ValueError(
        f"{type(taps.model).__name__} has {len(taps.stages)} stages, and none in front of the last "
        "ends where the network can be cut: name the place with cut=..., a module through which "
        "everything passes"
    )


def resolve_cut(taps: Taps, cut: TapKey) -> TapKey:
    """Return the tap that the option `cut` means.

    Args:
        taps: The network.
        cut: Number of a stage, a tap, or "auto" for `find_last_cut`.

    Returns:
        A stage number from 1, or a tap.

    Raises:
        ValueError: If it is neither a number nor a name, or there is no such stage.
    """
    cut = plain_scalar(cut)  # type: ignore[assignment]
    if isinstance(cut, bool) or not isinstance(cut, (int, str)) or cut == "":
        raise ValueError(
            f"cut is {describe_value(cut)}; allowed: the number of a stage, the name of a module, "
            "or 'auto'"
        )
    return find_last_cut(taps) if cut == "auto" else taps.resolve_key(cut)


def boundary_taps(taps: Taps, stage: TapKey) -> list[TapKey]:
    """Return taps of the tensors from which the network behind a stage is run.

    Args:
        taps: The network.
        stage: Number of the stage, or a tap.

    Returns:
        Mostly one tap, the stage itself; several where the stage ends in several tensors.
    """
    boundary = taps.boundary_of(stage)
    if len(boundary.tensors) == 1:
        return [taps.resolve_key(stage)]
    return [tensor.name for tensor in boundary.read_tensors]


def share_trunk(net: nn.Module, source: nn.Module, cut: Cut) -> None:
    """Replace the trunk of a network by that of another, so that both share it.

    Args:
        net: The network; it stays complete, and holds the modules and parameters of `source`
            wherever it had its own in front of the cut.
        source: A network of the same architecture.
        cut: The cut of either.
    """
    own_modules, source_modules = dict(net.named_modules()), dict(source.named_modules())
    modules = {id(own_modules[name]): source_modules[name] for name in cut.trunk}
    parameters = {
        id(net.get_parameter(name)): source.get_parameter(name) for name in cut.trunk_parameters
    }
    for module in own_modules.values():
        for name, child in module._modules.items():
            module._modules[name] = modules.get(id(child), child)
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameters.get(id(parameter), parameter)


def join_names(prefix: str, name: str) -> str:
    """Join the name of a module and of what it holds; the network itself has the empty name.

    Args:
        prefix: Full name of the module; "" for the network.
        name: Name inside it.

    Returns:
        The full name.
    """
    return f"{prefix}.{name}" if prefix else name
