"""A run in plain values: the plan before it, its configuration, and the card of its checkpoints."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.models.layer_groups import describe_layer_decay
from kdtoolkit.pipeline import fingerprint
from kdtoolkit.pipeline.plan import Plan
from kdtoolkit.types import LossWeight

NOT_TOLD = ("accelerator", "dry_run", "callbacks", "resume", "overwrite", "method_options")


def plan_of(parts: Any, facts: Any, settings: Any, callbacks: Sequence[Callback]) -> Plan:
    plan, s = Plan(parts.method.plan()), settings
    for callback in (*parts.method.callbacks, *callbacks):
        plan["losses"] = [*plan.get("losses", []), *callback.plan_rows()]
        plan["notes"] = [*plan.get("notes", []), *callback.plan_notes()]
    nets = {"student": parts.net} | parts.method.networks()
    nets |= {
        "teacher" if len(parts.teachers) == 1 else f"teacher/{i}": t.model
        for i, t in enumerate(parts.teachers)
    }
    plan["models"] = {
        role: getattr(net, "pretrained_cfg", {}).get("architecture") or type(net).__name__
        for role, net in nets.items()
    }
    plan["data"] = facts.describe
    plan["schedule"] = {
        "length": f"{s.max_steps} steps" if s.max_steps else f"{s.epochs} epochs", "batch_size": s.batch_size,
        "optimizer": s.optimizer, "lr": s.lr, "weight_decay": s.weight_decay, "scheduler": s.scheduler,
    }  # fmt: skip
    if parts.layers is not None:
        plan["schedule"]["layer_decay"] = describe_layer_decay(
            parts.net, parts.layers, s.layer_decay, s.lr
        )
    if parts.still is not None:
        plan["parameters"] = {
            **plan.get("parameters", {}),
            "frozen in the student": parts.still.count,
        }
    if parts.notes:
        plan["notes"] = [*plan.get("notes", []), *parts.notes]
    return plan


def config_of(
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    settings: Any,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """Every argument of distill() as it was resolved, for config.yaml."""
    config = {n: told(v) for n, v in given.items() if n not in NOT_TOLD}
    config |= {
        k: getattr(settings, k) for k in ("epochs", "max_steps", "lr", "weight_decay", "batch_size")
    }
    config["losses"] = {k: v if isinstance(v, (int, float)) else repr(v) for k, v in losses.items()}
    config["callbacks"] = [made(c) for c in callbacks]
    return config | {k: told(v) for k, v in options.items()}


def made(callback: Callback) -> str:
    """A callback as it was made, with its defaults."""
    args, kwargs = callback.init_arguments
    bound = inspect.signature(type(callback)).bind(*args, **kwargs)
    bound.apply_defaults()
    each = (f"{k}={repr(v) if callable(v) else told(v)!r}" for k, v in bound.arguments.items())
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(callback).__name__}({', '.join(each)})")


def card_of(
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    teachers: Sequence[nn.Module],
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from; teachers by structure and weights."""
    weights = {k: str(v) for k, v in losses.items()}
    networks = {"student": told(given["student"])}
    if given["freeze"] is not None:
        networks["freeze"] = told(given["freeze"])
    networks["teachers"] = [fingerprint.of_network(teacher) for teacher in teachers]
    same = ("temperature", "layers", "labelled", "grad_clip", "student_args", "transforms")
    used = {name: told(given[name]) for name in same} | {k: told(v) for k, v in options.items()}
    joined = [made(c) for c in callbacks if c.order < Callback.order]  # others only watch
    card = {
        "method": str(told(given["method"])),
        "losses": weights,
        "networks": networks,
        "options": used,
    }
    return card | {"callbacks": joined}


def told(value: Any) -> Any:
    """Plain values; of an object only its class, of a state dict the number of its tensors."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [told(v) for v in value]
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        tensors = sum(isinstance(v, Tensor) for v in value.values())
        return (
            f"<state dict of {tensors} tensors>"
            if tensors
            else {str(k): told(v) for k, v in value.items()}
        )
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
