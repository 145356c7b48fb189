"""Types and ranges of the fields of a configuration, as far as they need no data and no torch.

`DistillConfig` calls these when it is made. The numbers of the loop are checked by `TrainerConfig`;
what needs a network, the data or the disk by the step that reads it, before anything is trained.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kdtoolkit.utils.validation import (
    check_choice,
    check_flag,
    check_positive,
    check_temperature,
    check_whole_number,
    describe_value,
    plain_scalar,
)

if TYPE_CHECKING:
    from kdtoolkit.pipeline.config import (
        DataConfig,
        DistillConfig,
        LoopConfig,
        LossConfig,
        NetworksConfig,
        OptimConfig,
    )

# fields whose tensors, arrays and objects are the value itself, and not a number to be read
OBJECT_FIELDS = (
    "teacher", "student", "student_weights", "teacher_weights", "train_data", "eval_data",
    "transforms", "method", "baseline",
)  # fmt: skip
PRECISIONS = (None, "no", "fp16", "bf16")
PRECISION_NAMES = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "no"}
Part = TypeVar("Part")


def with_plain_numbers(part: Part) -> Part:
    """A part of a configuration, in which scalars of NumPy and torch are plain numbers.

    Args:
        part: One of the six parts.

    Returns:
        The part itself where it holds none, else a changed copy.
    """
    own = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    read = {name: value for name, value in own.items() if name not in OBJECT_FIELDS}
    plain = {name: _plain(value) for name, value in read.items()}
    changed = {name: value for name, value in plain.items() if value is not read[name]}
    return dataclasses.replace(part, **changed) if changed else part  # type: ignore[type-var]


def _plain(value: Any) -> Any:
    """A value with plain numbers, inside lists and dictionaries too; the same object if it is."""
    found: Any
    if type(value) is dict:
        found = {name: _plain(item) for name, item in value.items()}
        return found if any(found[name] is not value[name] for name in value) else value
    if type(value) in (list, tuple):
        found = [_plain(item) for item in value]
        same = all(new is old for new, old in zip(found, value, strict=True))
        return value if same else type(value)(found)
    return plain_scalar(value)


def check_fields(config: DistillConfig) -> None:
    """Check every field that needs neither networks nor data.

    Args:
        config: The configuration.

    Raises:
        ValueError: For the first value that is not allowed, with what is.
    """
    _check_networks(config.networks)
    _check_data(config.data)
    _check_loss(config.loss)
    _check_optim(config.optim)
    _check_loop(config.loop)
    check_flag("overwrite", config.output.overwrite)
    check_flag("figures", config.output.figures)
    check_flag("allow_weak_teacher", config.networks.allow_weak_teacher)
    check_choice("keep", config.output.keep, ("exported", "all"))


def _check_networks(networks: NetworksConfig) -> None:
    _check_path("teacher_dir", networks.teacher_dir, "the folder of fine-tuned teachers")
    _check_mapping("teacher_training", networks.teacher_training, "{'epochs': 3}")
    _check_mapping("student_args", networks.student_args, "{'img_size': 32}")
    each = networks.teacher_args
    for options in each if isinstance(each, (list, tuple)) else [each]:
        _check_mapping("teacher_args", options, "{'img_size': 32}, or a list of one a teacher")
    _check_freeze(networks.freeze)


def _check_freeze(freeze: object) -> None:
    if freeze is None or (isinstance(freeze, str) and freeze.strip()):
        return
    if type(freeze) is int and freeze > 0:
        return
    if not (isinstance(freeze, (list, tuple)) and freeze and all(map(_is_text, freeze))):
        raise ValueError(
            f"freeze={describe_value(freeze)}: stages from the image as a number from 1, a "
            "list of names of modules, or 'backbone' (all but the classifier)"
        )


def _check_data(data: DataConfig) -> None:
    _check_path("data_path", data.data_path, "the folder of a local copy of the data")
    for name, meaning in (("num_classes", "classes"), ("train_limit", "rows to train on")):
        value = getattr(data, name)
        if value is not None:
            check_whole_number(name, value, meaning=meaning)


def _check_loss(loss: LossConfig) -> None:
    _check_mapping("options", loss.options, "{'reset': [2]}")
    if loss.losses is not None:
        _check_mapping("losses", loss.losses, "{'ce': 0.1, 'kd': 0.9}")
    if loss.temperature is not None:
        check_temperature(loss.temperature)


def _check_optim(optim: OptimConfig) -> None:
    if not isinstance(optim.milestones, (list, tuple)):
        raise ValueError(
            f"milestones is {describe_value(optim.milestones)}; allowed: a list of shares of the "
            "run, each from 0 to 1, such as [0.5, 0.75]"
        )


def _check_loop(loop: LoopConfig) -> None:
    precision = loop.mixed_precision
    if isinstance(precision, str) and precision in PRECISION_NAMES:
        raise ValueError(
            f"mixed_precision is {precision!r}; write {PRECISION_NAMES[precision]!r}. Allowed: "
            f"{', '.join(map(repr, PRECISIONS))}"
        )
    check_choice("mixed_precision", precision, PRECISIONS)
    check_flag("compile", loop.compile)
    check_choice("channels_last", loop.channels_last, ("auto", True, False))
    check_positive("rank_timeout", loop.rank_timeout, "seconds without an answer of a process")
    if not _is_text(loop.label):
        raise ValueError(f"label is {describe_value(loop.label)}; allowed: text")
    _check_trackers(loop.report_to)
    if not isinstance(loop.progress, (bool, str)):
        raise ValueError(
            f"progress is {describe_value(loop.progress)}; allowed: 'auto', 'bar', 'lines', 'off', "
            "True, False"
        )


def _check_trackers(report_to: object) -> None:
    is_list = isinstance(report_to, (list, tuple)) and all(map(_is_text, report_to))
    if report_to is None or is_list or (isinstance(report_to, str) and report_to):
        return
    raise ValueError(
        f"report_to is {describe_value(report_to)}; allowed: 'auto', 'none', the name of a "
        "tracker such as 'tensorboard', or a list of names"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _check_mapping(name: str, value: object, example: str) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(map(_is_text, value)):
        raise ValueError(
            f"{name} is {describe_value(value)}; allowed: a dictionary of names and values, such "
            f"as {example}"
        )


def _check_path(name: str, value: object, meaning: str) -> None:
    if value is None:
        return
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError(f"{name} is {describe_value(value)}; allowed: a path ({meaning}) or None")
