"""What a checkpoint must agree with to be resumed from: a run in plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.data.dataset import Data
from kdtoolkit.pipeline import fingerprint
from kdtoolkit.pipeline.config import FIELD_PART, DistillConfig
from kdtoolkit.pipeline.config_file import callback_to_plain, to_plain_value
from kdtoolkit.types import LossWeight

# fields that must be the same in a resumed run, beside the method, its losses and its networks
SAME_FIELDS = ("layers", "labelled", "grad_clip", "student_args", "transforms")
# fields whose content is compared: teachers by their weights, data by its rows, and those that
# `checkpoint_metadata` and the trainer name one by one
BY_CONTENT = (
    "teacher", "teacher_weights", "teacher_args", "teacher_training", "student", "student_weights",
    "freeze", "train_data", "eval_data", "data_path", "num_classes", "method", "losses",
    "temperature", "options", "epochs", "max_steps", "batch_size", "grad_accum", "optimizer", "lr",
    "weight_decay", "scheduler", "layer_decay", "seed", "mixed_precision", *SAME_FIELDS,
)  # fmt: skip
# fields that may change: where files lie, what is shown and written, and how the same numbers are
# computed (up to rounding)
MAY_CHANGE = (
    "teacher_dir", "num_workers", "compile", "channels_last", "log_every", "eval_test", "report_to",
    "progress", "label", "output_dir", "resume", "overwrite", "keep", "baseline", "rank_timeout",
    "allow_weak_teacher", "figures",
)  # fmt: skip
MULTISTEP_ONLY = ("milestones", "gamma")


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


def describe_training(config: DistillConfig, precision: str) -> dict[str, Any]:
    """Settings of the loop that must be the same in a resumed run, beside those of the trainer.

    Args:
        config: The configuration.
        precision: Precision of forward and backward passes.

    Returns:
        Field -> plain value: every field that is not compared by its content and may not change.
    """
    unused = () if config.optim.scheduler == "multistep" else MULTISTEP_ONLY
    found = _other_fields(config, lambda part, name: part != "data" and name not in unused)
    weights = config.networks.student_weights
    if weights is not None:
        found["student_weights"] = fingerprint.of_weights_source(weights)
    return found | {"mixed_precision": precision}


def describe_data(config: DistillConfig, data: Data) -> dict[str, Any]:
    """What of the data must be the same in a resumed run.

    Args:
        config: The configuration.
        data: The data.

    Returns:
        Field -> plain value, classes, sizes, and a digest of each split.
    """
    return {
        **_other_fields(config, lambda part, name: part == "data"),
        "classes": fingerprint.of_plain([data.num_classes, data.class_names]),
        "size": list(data.image_size),
        "fingerprint": fingerprint.of_rows(data),
    }


def _other_fields(config: DistillConfig, wanted: Callable[[str, str], bool]) -> dict[str, Any]:
    values = config.flat()
    names = [name for name in FIELD_PART if name not in (*BY_CONTENT, *MAY_CHANGE)]
    return {name: to_plain_value(values[name]) for name in names if wanted(FIELD_PART[name], name)}


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
