"""What a checkpoint must agree with to be resumed from: a run in plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.pipeline import fingerprint
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import callback_to_plain, to_plain_value
from kdtoolkit.types import LossWeight

# fields that must be the same in a resumed run, beside the method, its losses and its networks
SAME_FIELDS = ("layers", "labelled", "grad_clip", "student_args", "transforms")


def checkpoint_metadata(
    config: DistillConfig,
    resolved: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    teachers: Sequence[nn.Module],
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed from; teachers by structure and weights.

    Args:
        config: The configuration.
        resolved: Field -> what its default became, with the method's "options" and "temperature".
        losses: Loss -> weight.
        teachers: The teachers' networks.
        callbacks: All callbacks that change what is computed.

    Returns:
        Plain values by topic.
    """
    values = config.flat()
    networks: dict[str, Any] = {"student": to_plain_value(values["student"])}
    if values["freeze"] is not None:
        networks["freeze"] = to_plain_value(values["freeze"])
    networks["teachers"] = [fingerprint.of_network(teacher) for teacher in teachers]
    options = {name: to_plain_value(values[name]) for name in SAME_FIELDS}
    options["temperature"] = to_plain_value(resolved["temperature"])
    options |= {name: to_plain_value(value) for name, value in resolved["options"].items()}
    watching = Callback.order  # callbacks of this place or later only watch
    return {
        "method": str(to_plain_value(values["method"])),
        "losses": {name: str(weight) for name, weight in losses.items()},
        "networks": networks,
        "options": options,
        "callbacks": [describe_callback(c) for c in callbacks if c.order < watching],
    }


def describe_callback(callback: Callback) -> str:
    """A callback with all its arguments, as text; addresses of objects are left out.

    Args:
        callback: The callback.

    Returns:
        "Class(argument=value, ...)".
    """
    plain = callback_to_plain(callback)
    arguments = {k: v for k, v in plain.items() if k not in ("callback", "object")}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(callback).__name__}({shown})")
