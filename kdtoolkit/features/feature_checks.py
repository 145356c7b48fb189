"""Checks of one tapped forward: the logits are a tensor, and every tap has read its feature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdtoolkit.features.hooks import FeatureStore
from kdtoolkit.features.model_output import take_logits
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.types import TapKey

OVERWRITTEN = (
    "is overwritten in place by a later operation: the feature would not be what the stage "
    "returned. Tap the module that overwrites it, or build the model with inplace=False"
)


def check_logits(model: nn.Module, logits: object) -> Tensor:
    """Check that a model returned one tensor of logits, alone or under the name `logits`.

    Args:
        model: The model.
        logits: What it returned.

    Returns:
        The logits.

    Raises:
        ValueError: If there is no such tensor.
    """
    logits = take_logits(logits)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns {type(logits).__name__}, logits must be one tensor "
            "(B, C), alone or under the name 'logits' (attribute or key); wrap the model or set "
            "the option that makes it return logits alone"
        )
    return logits


def check_features(
    model: nn.Module,
    trace: ModelTrace,
    store: FeatureStore,
    boundaries: Mapping[TapKey, StageBoundary],
) -> None:
    """Check what the hooks of some taps stored in the last forward.

    Args:
        model: The model.
        trace: Its trace.
        store: What the hooks stored.
        boundaries: The taps and the tensors that they read.

    Raises:
        RuntimeError: If a tensor was not returned exactly once, was overwritten in place, or was
            computed without autograd although something in front of it is trained.
    """
    for key, boundary in boundaries.items():
        for index, tensor in enumerate(boundary.tensors):
            place = key, index
            if store.fired.get(place, 0) != 1:
                raise _wrong_count(key, tensor.name, store.fired.get(place, 0))
            if store.versions.get(place, -1) not in (-1, store.feats[place]._version):
                raise RuntimeError(f"tap {key!r} ({tensor.name}) {OVERWRITTEN}")
            lost_gradient = torch.is_grad_enabled() and not store.grad.get(place, True)
            if lost_gradient and _is_trained_up_to(model, trace, tensor.module):
                raise RuntimeError(
                    f"tap {key!r} ({tensor.name}) was computed without autograd, no gradient would "
                    "reach the network from it: reentrant gradient checkpointing does that. Use "
                    "use_reentrant=False, or turn checkpointing off"
                )


def _wrong_count(key: TapKey, name: str, count: int) -> RuntimeError:
    times = f"fired {count} times" if count else "never fired"
    return RuntimeError(
        f"tap {key!r} ({name}) {times}: gradient checkpointing calls the children of a block "
        "directly, some options fuse blocks, and a model that was compiled and called before has "
        "no place for hooks. Tap a module inside it, turn the option off, or pass the model "
        "uncompiled"
    )


def _is_trained_up_to(model: nn.Module, trace: ModelTrace, module: str) -> bool:
    """Whether anything that returns up to a module is trained."""
    until = trace.calls[module][0].returned_at
    names = [name for name, calls in trace.calls.items() if calls[0].returned_at <= until]
    return any(p.requires_grad for name in names for p in model.get_submodule(name).parameters())
