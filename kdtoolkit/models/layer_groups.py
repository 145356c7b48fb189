"""How deep a parameter lies: what runs up to the end of a stage, layers from the image on, learning rates by layer.

The rate of layer l of L + 1 (numbered from the image, L the classifier) is lr * layer_decay ** (L - l), as in BEiT (Bao
et al. 2021, arXiv 2106.08254) and timm.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.tracing import meta_copy, sources
from kdtoolkit.types import TapKey


def modules_up_to(taps: Taps, stage: TapKey) -> list[str]:
    """Modules all of whose calls are over when this stage ends (a number from 1, or a tap), and their children."""
    left = taps.end(stage).left
    over = {
        name
        for name, calls in taps.trace.calls.items()
        if calls and all(c.left <= left for c in calls)
    }
    names = [name for name, _ in taps.model.named_modules() if name]
    return [name for name in names if any(name == o or name.startswith(f"{o}.") for o in over)]


def parameters_up_to(taps: Taps, stage: TapKey) -> list[str]:
    """Parameters of these modules, and others that the stage's feature depends on: class tokens, position tables."""
    inside = set(modules_up_to(taps, stage))
    below = _ancestors(taps, {part.module for part in taps.end(stage).parts})
    names = [name for name, _ in taps.model.named_parameters()]
    return [name for name in names if name.rpartition(".")[0] in inside or name in below]


def _ancestors(taps: Taps, ends: set[str]) -> set[str]:
    """Parameters from which a path of the autograd graph leads to the output of one of these modules."""
    try:
        return _reached(meta_copy(taps.model), ends, taps.size, "meta")
    except Exception:  # as in trace: no deep copy without data, or code that asks for values
        real = next(taps.model.parameters())
        return _reached(copy.deepcopy(taps.model).eval(), ends, taps.size, str(real.device))


def _reached(model: nn.Module, ends: set[str], size: tuple[int, ...], device: str) -> set[str]:
    model.requires_grad_(True)
    kept: list[Any] = []
    for end in ends:
        model.get_submodule(end).register_forward_hook(
            lambda module, args, output: kept.extend(tree_leaves(output))
        )
    dtype = next(model.parameters()).dtype
    with torch.enable_grad(), torch.device(device):
        model(torch.full((2, *size), 0.5, dtype=dtype, device=device))
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)] for t in kept if isinstance(t, Tensor) for p in sources(t) if id(p) in names
    }


# --------------------------------------------------------------------------------------------------------------- rates
def layer_numbers(taps: Taps) -> dict[str, int]:
    """Parameter -> layer, 0 next to the image: by the model's own `group_matcher` (timm), else by the stages that were
    found, the classifier and what else follows the last stage being the last layer."""
    model = taps.model
    if hasattr(model, "group_matcher"):
        matched = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        if len(set(matched.values())) > 1:
            return matched
    layers = {name: len(taps.stages) for name, _ in model.named_parameters()}
    for stage in range(len(taps.stages), 0, -1):
        layers |= {name: stage - 1 for name in parameters_up_to(taps, stage)}
    if len(set(layers.values())) < 2:
        raise ValueError(
            f"layer_decay: {type(model).__name__} has no group_matcher that tells layers apart, and no stages "
            "were found in it: leave layer_decay out, or give the model a group_matcher as timm's have"
        )
    return layers


def describe_layer_decay(
    net: nn.Module, layers: Mapping[str, int], layer_decay: float, lr: float
) -> str:
    """For the plan: the range of the learning rates of what is trained."""
    trained = {layers[name] for name, p in net.named_parameters() if p.requires_grad}
    steps = max(layers.values()) - min(trained)
    return (
        f"{layer_decay:g} over {len(trained)} layers: lr {lr * layer_decay**steps:.3g} to {lr:.3g}"
    )


def layer_decay_groups(
    method: nn.Module, net: nn.Module, layers: Mapping[str, int], *, lr: float, decay: float, weight_decay: float,
    filtered: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Parameter groups for an optimizer: of `net` one per layer, with its own lr; all else of `method` at the full lr.

    layers    parameter of `net` -> layer, as layer_numbers() gives it
    decay     factor from one layer to the next towards the image, 0 < decay <= 1
    filtered  no weight decay on biases, norms and what the network's no_weight_decay() names
    """
    view = SimpleNamespace(
        named_parameters=net.named_parameters, group_matcher=lambda coarse: layers.__getitem__
    )
    none: Any = getattr(net, "no_weight_decay", set)() if filtered else set()
    same: dict[str, Any] = {"weight_decay": weight_decay, "weight_decay_exclude_1d": filtered}
    groups = param_groups_layer_decay(view, layer_decay=decay, no_weight_decay_list=none, **same)  # type: ignore[arg-type]
    own = {id(p) for p in net.parameters()}
    rest = [(name, p) for name, p in method.named_parameters() if id(p) not in own]
    groups += param_groups_weight_decay(SimpleNamespace(named_parameters=lambda: rest), **same)  # type: ignore[arg-type]
    return [
        {k: v for k, v in g.items() if k != "lr_scale"} | {"lr": lr * g.get("lr_scale", 1.0)}
        for g in groups
    ]
