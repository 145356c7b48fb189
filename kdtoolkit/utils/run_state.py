"""The state of everything that an `accelerate.Accelerator` has prepared, taken out and put back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtoolkit.utils import distributed

States: TypeAlias = dict[str, Any]  # name of a file of a checkpoint, without suffix -> its state

MODEL, OPTIMIZER, LOOP, RANDOM = "model", "optimizer", "loop", "random"
DEVICES = ("cuda", "xpu")  # modules of torch with a random state of each device


class HasState(Protocol):
    """What has a state beside the objects that accelerate prepares: the training loop."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its state."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Take back what `state_dict` returned."""
        ...


def collect_states(accelerator: Accelerator, loop: HasState) -> States:
    """The state of models, optimizers, schedules, the loop, and random numbers of every rank.

    All ranks call it. Names of weights are those of the bare models: a checkpoint does not depend
    on what wraps them.

    Args:
        accelerator: The accelerator of the run.
        loop: The training loop.
    """
    states: States = {}
    for number, model in enumerate(accelerator._models):
        states[_numbered(MODEL, number)] = _whole(dict(_bare(accelerator, model).state_dict()))
    states[OPTIMIZER] = [_whole(o.state_dict()) for o in accelerator._optimizers]
    scaler = accelerator.scaler
    states[LOOP] = {
        "loop": dict(loop.state_dict()),
        "schedulers": [s.state_dict() for s in accelerator._schedulers],
        "scaler": None if scaler is None else scaler.state_dict(),
        "registered": [o.state_dict() for o in accelerator._custom_objects],
        "batches_since_step": accelerator.step,
    }
    states[RANDOM] = distributed.gather_objects(_random_state())
    return states


def apply_states(accelerator: Accelerator, states: Mapping[str, Any], loop: HasState) -> None:
    """Put states back. All ranks call it.

    Args:
        accelerator: The accelerator of the run, with the same objects prepared.
        states: What `collect_states` returned.
        loop: The training loop.

    Raises:
        ValueError, RuntimeError, KeyError, TypeError, AttributeError: If they do not fit.
    """
    for number, model in enumerate(accelerator._models):
        _bare(accelerator, model).load_state_dict(states[_numbered(MODEL, number)])
    for optimizer, state in zip(accelerator._optimizers, states[OPTIMIZER], strict=True):
        _load_optimizer(optimizer, state)
    rest = states[LOOP]
    for scheduler, state in zip(accelerator._schedulers, rest["schedulers"], strict=True):
        scheduler.load_state_dict(state)
    if accelerator.scaler is not None and rest["scaler"]:
        accelerator.scaler.load_state_dict(rest["scaler"])
    accelerator.step = rest["batches_since_step"]
    if distributed.rank() < len(states[RANDOM]):  # of more processes than before, the rest are new
        _set_random_state(states[RANDOM][distributed.rank()])
    for registered, state in zip(accelerator._custom_objects, rest["registered"], strict=True):
        registered.load_state_dict(state)
    loop.load_state_dict(rest["loop"])


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}_{number}"


def _bare(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model without what distributed training and compilation wrap around it."""
    bare: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return bare


def _whole(state: Any) -> Any:
    """The state with the shards of every tensor gathered; all ranks call it."""
    if isinstance(state, dict):
        return {key: _whole(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_whole(value) for value in state)
    gather = getattr(state, "full_tensor", None)
    return state if gather is None else gather()


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state bit for bit: torch casts it to the dtypes of the parameters."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    devices = [
        {key: value.device for key, value in group.items() if isinstance(value, Tensor)}
        for group in inner.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, places in zip(inner.param_groups, devices, strict=True):
        for key, device in places.items():
            if isinstance(group.get(key), Tensor):
                group[key] = group[key].to(device)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in inner.param_groups for p in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"] and parameter in inner.state:
            stored = state["state"][number]
            inner.state[parameter] = _with_dtypes(inner.state[parameter], stored)


def _with_dtypes(loaded: Any, stored: Any) -> Any:
    """`loaded` with the stored value where torch has changed the dtype."""
    if isinstance(loaded, Tensor) and isinstance(stored, Tensor):
        return loaded if loaded.dtype == stored.dtype else stored.to(loaded.device, copy=True)
    if isinstance(loaded, dict) and isinstance(stored, dict):
        return {key: _with_dtypes(value, stored.get(key)) for key, value in loaded.items()}
    if type(loaded) in (list, tuple) and type(loaded) is type(stored):
        return type(loaded)(map(_with_dtypes, loaded, stored))
    return loaded


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    for name in DEVICES:
        module = getattr(torch, name)
        if module.is_available():
            state[name] = [one.cpu() for one in module.get_rng_state_all()]
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for name in DEVICES:
        module = getattr(torch, name)
        if module.is_available() and name in state:
            for device, one in enumerate(state[name][: module.device_count()]):
                module.set_rng_state(one, device)
