"""The classifier of a network: how many classes it has, which module it is, and a new one for other classes."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.tracing import value_of


def num_outputs(taps: Taps) -> int:
    """Classes: what a timm model says of itself (0 without a classifier), of others the shape of the logits."""
    known = getattr(taps.model, "num_classes", None)
    if (
        isinstance(known, int)
        and hasattr(taps.model, "pretrained_cfg")
        and hasattr(taps.model, "reset_classifier")
    ):
        return known
    logits = taps.trace.logits
    if not taps.trace.bare_logits or len(logits) != 1 or logits[0].dim() != 2:
        kind = "" if taps.trace.bare_logits else "a tuple, list or dict of "
        raise ValueError(
            f"{type(taps.model).__name__} returns {kind}{[tuple(t.shape) for t in logits]}: "
            "logits must be one tensor (B, classes), wrap the model"
        )
    return int(logits[0].shape[1])


def classifier_names(taps: Taps) -> list[str]:
    """Names of the modules that make the logits: what timm's get_classifier returns, else the one nn.Linear whose
    output is the logits; empty where there is none."""
    model = taps.model
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # type: ignore[operator]
        found = found.values() if isinstance(found, (dict, nn.ModuleDict)) else found
        heads = [found] if isinstance(found, nn.Module) else list(found or ())
        return [name for name, module in model.named_modules() if _one_of(module, heads)]
    logits = [value_of(t) for t in taps.trace.logits]
    modules = dict(model.named_modules())
    calls = (taps.trace.once(name) for name in taps.trace.calls)
    return [
        c.name for c in calls if c and c.values == logits and isinstance(modules[c.name], nn.Linear)
    ]


def _one_of(module: nn.Module, heads: list[Any]) -> bool:
    return any(module is head for head in heads) and any(True for _ in module.parameters())


def replace_head(taps: Taps, classes: int, seed: int) -> None:
    """Give the network a classifier for `classes`, in place. Its first weights depend on `seed` alone."""
    model = taps.model
    python = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.device(next(model.parameters()).device):
        torch.manual_seed(seed)
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(classes)  # type: ignore[operator]
        else:
            _replace(taps, classes)
    random.setstate(python)


def _replace(taps: Taps, classes: int) -> None:
    names = classifier_names(taps)
    if len(names) != 1:
        raise ValueError(
            f"{type(taps.model).__name__} has no reset_classifier, and no nn.Linear makes its logits: give it a "
            f"head of {classes} classes yourself and train it with method='none', or pass teacher_head='feature-only'"
        )
    parent, _, last = names[0].rpartition(".")
    old: Any = taps.model.get_submodule(names[0])
    head = nn.Linear(old.in_features, classes, bias=old.bias is not None, dtype=old.weight.dtype)
    setattr(taps.model.get_submodule(parent), last, head)
