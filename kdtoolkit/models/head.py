"""The classifier of a network: its number of classes, its modules, and its replacement."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.autograd_graph import graph_value
from kdtoolkit.features.extractor import Taps


def num_outputs(taps: Taps) -> int:
    """Return the number of classes of a network.

    Args:
        taps: The network.

    Returns:
        For a timm model its own `num_classes` (0 without a classifier), for others the size of the
        logits.

    Raises:
        ValueError: If the network does not return logits (B, classes).
    """
    declared = getattr(taps.model, "num_classes", None)
    is_timm = hasattr(taps.model, "pretrained_cfg") and hasattr(taps.model, "reset_classifier")
    if isinstance(declared, int) and is_timm:
        return declared
    logits = taps.trace.logits
    if not taps.trace.returns_tensor or len(logits) != 1 or logits[0].dim() != 2:
        kind = "" if taps.trace.returns_tensor else "a tuple, list or dict of "
        raise ValueError(
            f"{type(taps.model).__name__} returns {kind}{[tuple(t.shape) for t in logits]}: "
            "logits must be one tensor (B, classes), alone or under the name 'logits' (attribute "
            "or key): wrap the model"
        )
    return int(logits[0].shape[1])


def classifier_names(taps: Taps) -> list[str]:
    """Find the modules that make the logits.

    Args:
        taps: The network.

    Returns:
        Names of the modules that timm's `get_classifier` returns, else of the one `nn.Linear` whose
        output is the logits; empty where there is none.
    """
    model = taps.model
    if hasattr(model, "get_classifier"):
        heads = _declared_classifiers(model)
        return [
            name
            for name, module in model.named_modules()
            if any(module is head for head in heads) and _has_parameters(module)
        ]
    logits = [graph_value(tensor) for tensor in taps.trace.logits]
    modules = dict(model.named_modules())
    calls = [taps.trace.single_call(name) for name in taps.trace.calls]
    return [
        call.name
        for call in calls
        if call and call.output_values == logits and isinstance(modules[call.name], nn.Linear)
    ]


def _declared_classifiers(model: Any) -> list[Any]:
    found = model.get_classifier()
    if isinstance(found, nn.ModuleDict | dict):
        return list(found.values())
    return [found] if isinstance(found, nn.Module) else list(found or ())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def replace_head(taps: Taps, classes: int, seed: int) -> None:
    """Give a network a new classifier, in place.

    Args:
        taps: The network.
        classes: Number of classes of the new one.
        seed: Its initial weights depend on this alone; the global generators do not move.

    Raises:
        ValueError: If the network has no `reset_classifier`, and no `nn.Linear` makes its logits.

    Example:
        ```python
        replace_head(Taps(net, None), classes=10, seed=0)
        ```
    """
    model: Any = taps.model
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.device(next(model.parameters()).device):
        torch.manual_seed(seed)
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(classes)
        else:
            _replace_linear(taps, classes)
    random.setstate(python_state)


def _replace_linear(taps: Taps, classes: int) -> None:
    names = classifier_names(taps)
    if len(names) != 1:
        raise ValueError(
            f"{type(taps.model).__name__} has no reset_classifier, and no nn.Linear makes its "
            f"logits: give it a head of {classes} classes yourself and train it with "
            "method='none', or pass teacher_head='feature-only'"
        )
    parent, _, last = names[0].rpartition(".")
    old: Any = taps.model.get_submodule(names[0])
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None, dtype=old.weight.dtype)
    setattr(taps.model.get_submodule(parent), last, new)
