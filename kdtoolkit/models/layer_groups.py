"""How deep a parameter lies: what runs up to the end of a stage, layer numbers, rates by layer.

With `layer_decay`, the learning rate of layer l of 0 to L (0 next to the image, L the classifier)
is lr * layer_decay ** (L - l), as in BEiT (Bao et al. 2021, arXiv 2106.08254) and timm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import (  # type: ignore[attr-defined]
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.autograd_graph import source_leaves
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.tracing import meta_copy
from kdtoolkit.types import TapKey


def modules_up_to(taps: Taps, stage: TapKey) -> list[str]:
    """Find the modules all of whose calls are over when a stage ends, and their children.

    Args:
        taps: The network.
        stage: Number of the stage from 1, or a tap.

    Returns:
        Their names, in the order of the network.
    """
    end = taps.boundary_of(stage).returned_at
    finished = [
        name
        for name, calls in taps.trace.calls.items()
        if calls and all(call.returned_at <= end for call in calls)
    ]
    inside = tuple(f"{name}." for name in finished)
    names = [name for name, _ in taps.model.named_modules() if name]
    return [name for name in names if f"{name}.".startswith(inside)]


def parameters_up_to(taps: Taps, stage: TapKey) -> list[str]:
    """Find the parameters that the feature of a stage depends on.

    Args:
        taps: The network.
        stage: Number of the stage from 1, or a tap.

    Returns:
        Names of the parameters of `modules_up_to`, and of others that the feature is computed from,
        such as class tokens and position tables; in the order of the network.
    """
    modules = set(modules_up_to(taps, stage))
    used = _parameters_used_by(taps, {tensor.module for tensor in taps.boundary_of(stage).tensors})
    names = [name for name, _ in taps.model.named_parameters()]
    return [name for name in names if name.rpartition(".")[0] in modules or name in used]


def _parameters_used_by(taps: Taps, modules: set[str]) -> set[str]:
    """Parameters that the outputs of these modules are computed from, by the autograd graph."""
    try:
        return _trace_parameters(meta_copy(taps.model), modules, taps.size, torch.device("meta"))
    except Exception:  # as in tracing: no deep copy without data, or code that reads values
        device = next(taps.model.parameters()).device
        real_copy = copy.deepcopy(taps.model).eval()
        return _trace_parameters(real_copy, modules, taps.size, device)


def _trace_parameters(
    model: nn.Module, modules: set[str], size: tuple[int, ...], device: torch.device
) -> set[str]:
    model.requires_grad_(True)
    outputs: list[object] = []

    def keep_output(module: nn.Module, args: object, output: object) -> None:
        outputs.extend(tree_leaves(output))

    for name in modules:
        model.get_submodule(name).register_forward_hook(keep_output)
    dtype = next(model.parameters()).dtype
    with torch.enable_grad(), device:
        model(torch.full((2, *size), 0.5, dtype=dtype, device=device))
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    used = {id(leaf) for tensor in tensors for leaf in source_leaves(tensor)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in used}


# ---------------------------------------------------------------------------------- rates
def layer_numbers(taps: Taps) -> dict[str, int]:
    """Number the layers of a network, for `layer_decay`.

    Args:
        taps: The network.

    Returns:
        Name of a parameter -> number of its layer, 0 next to the image. They come from the model's
        own `group_matcher` (timm), else from the stages that were found; then the classifier and
        all else behind the last stage is the last layer.

    Raises:
        ValueError: If neither tells layers apart.
    """
    model = taps.model
    matcher: Callable[..., Any] | None = getattr(model, "group_matcher", None)
    if matcher is not None:
        matched: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        if len(set(matched.values())) > 1:
            return matched
    layers = dict.fromkeys((name for name, _ in model.named_parameters()), len(taps.stages))
    for stage in range(len(taps.stages), 0, -1):
        layers |= dict.fromkeys(parameters_up_to(taps, stage), stage - 1)
    if len(set(layers.values())) < 2:
        raise ValueError(
            f"layer_decay: {type(model).__name__} has no group_matcher that tells layers apart, "
            "and no stages were found in it: leave layer_decay out, or give the model a "
            "group_matcher as timm's have"
        )
    return layers


def describe_layer_decay(
    net: nn.Module, layers: Mapping[str, int], layer_decay: float, lr: float
) -> str:
    """Describe the range of the learning rates of what is trained, for the plan.

    Args:
        net: The network.
        layers: Name of a parameter -> number of its layer, see `layer_numbers`.
        layer_decay: Factor from one layer to the next towards the image, 0 to 1.
        lr: Learning rate of the last layer.

    Returns:
        One line.
    """
    trained = {layers[name] for name, p in net.named_parameters() if p.requires_grad}
    steps = max(layers.values()) - min(trained)
    lowest = lr * layer_decay**steps
    return f"{layer_decay:g} over {len(trained)} layers: lr {lowest:.3g} to {lr:.3g}"


def layer_decay_groups(
    method: nn.Module,
    net: nn.Module,
    layers: Mapping[str, int],
    *,
    lr: float,
    decay: float,
    weight_decay: float,
    filtered: bool,
) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer, of the network one per layer with its own rate.

    Args:
        method: What is trained: the network and, at the full rate, all else.
        net: The network.
        layers: Name of its parameters -> number of their layers, see `layer_numbers`.
        lr: Learning rate of the last layer.
        decay: Factor from one layer to the next towards the image, 0 < decay <= 1.
        weight_decay: Weight decay.
        filtered: Whether biases, norms and what the network's `no_weight_decay()` names have no
            weight decay.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.
    """
    not_decayed: Any = getattr(net, "no_weight_decay", set)() if filtered else ()
    groups = param_groups_layer_decay(
        _as_module(net.named_parameters, group_matcher=lambda coarse: layers.__getitem__),
        weight_decay,
        not_decayed,
        layer_decay=decay,
        weight_decay_exclude_1d=filtered,
    )
    own = {id(p) for p in net.parameters()}
    rest = [(name, p) for name, p in method.named_parameters() if id(p) not in own]
    groups += param_groups_weight_decay(
        _as_module(lambda: rest), weight_decay, weight_decay_exclude_1d=filtered
    )
    return [_with_rate(group, lr) for group in groups]


def _as_module(named_parameters: Callable[[], object], **attributes: object) -> nn.Module:
    """An object with the methods that timm's parameter groups call."""
    return cast(nn.Module, SimpleNamespace(named_parameters=named_parameters, **attributes))


def _with_rate(group: dict[str, Any], lr: float) -> dict[str, Any]:
    """The group with its learning rate in place of timm's scale."""
    scale = group.get("lr_scale", 1.0)
    return {key: value for key, value in group.items() if key != "lr_scale"} | {"lr": lr * scale}
