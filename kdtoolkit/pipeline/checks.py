"""Checks of a configuration that need no weights and no data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn

from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.data.columns import check_columns
from kdtoolkit.data.image_options import check_image_options
from kdtoolkit.data.options import (
    check_image_size,
    check_labelled,
    check_num_workers,
    check_transforms,
)
from kdtoolkit.data.splits import check_validation
from kdtoolkit.methods.factory import check_layers
from kdtoolkit.methods.resolve import (
    ResolvedLosses,
    check_loss_name,
    default_losses,
    find_strategy,
    resolve_losses,
)
from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig
from kdtoolkit.pipeline.networks import as_list
from kdtoolkit.pipeline.teachers import check_head_names
from kdtoolkit.utils.registry import keyword_defaults, keyword_options
from kdtoolkit.utils.validation import check_flag, describe_value

if TYPE_CHECKING:
    from kdtoolkit.data.dataset import Data

# fields of NetworksConfig and LossConfig that a Method which is already built brings itself
BUILT_IN_METHOD = (
    "losses", "teacher_head", "student_args", "teacher_args", "student_weights", "teacher_weights",
)  # fmt: skip


def resolve_method(config: DistillConfig) -> ResolvedLosses | None:
    """Check the method, its losses and its teacher.

    Args:
        config: The configuration.

    Returns:
        Losses, weights and options of a method given by name; None for a `Method` that is already
        built.

    Raises:
        ValueError: For an unknown name or option, a teacher that is missing or has no use, and
            options without effect.
    """
    method, networks = config.loss.method, config.networks
    check_head_names(networks)
    if isinstance(method, Method):
        _check_built_method(method, config)
        return None
    if networks.student is None:
        raise ValueError("student=None: pass a model or a timm name, it is what is trained")
    check_layers(config.loss.layers)
    strategy, options = find_strategy(method), dict(config.loss.options or {})
    if strategy is not None:
        _check_strategy(strategy, _losses_beside(strategy, config), config)
    if config.loss.temperature is not None:
        options["temperature"] = config.loss.temperature
    resolved = resolve_losses(method, config.loss.losses, options, argument_names=FIELD_NAMES)
    if strategy is None:
        _check_teacher_use(resolved, config)
    return resolved


def _check_teacher_use(resolved: ResolvedLosses, config: DistillConfig) -> None:
    method, teacher = config.loss.method, config.networks.teacher
    wanting = resolved.losses_with_teacher()
    if wanting and teacher is None:
        raise ValueError(
            f"method {method!r} needs a teacher for {', '.join(map(repr, wanting))} and "
            "teacher=None: pass a model, "
            "or method='none' for plain training"
        )
    if teacher is None:
        _check_no_teacher_options(config, method)
    if not wanting and teacher is not None:
        raise ValueError(f"method {method!r} uses no teacher: pass teacher=None, or another method")


def _check_no_teacher_options(config: DistillConfig, method: object) -> None:
    for name in ("teacher_head", "teacher_args", "teacher_weights"):
        value = getattr(config.networks, name)
        is_empty = isinstance(value, (list, tuple, Mapping)) and not value
        if value is not None and not is_empty:
            raise ValueError(
                f"{name} has no effect: method {method!r} has no teacher; leave it out"
            )


def _losses_beside(strategy: StrategySpec, config: DistillConfig) -> list[type[DistillationLoss]]:
    """The registered losses beside a strategy."""
    method, losses = config.loss.method, config.loss.losses
    assert not isinstance(method, Method)
    names = losses if isinstance(losses, Mapping) else default_losses(method)
    for name in names:
        check_loss_name(name, strategy)
    return [LOSSES[name] for name in names if name not in strategy.losses]


def _check_strategy(
    strategy: StrategySpec, beside: Sequence[type[DistillationLoss]], config: DistillConfig
) -> None:
    method, networks = config.loss.method, config.networks
    wanting = [loss.registered for loss in beside if loss.needs_teacher]
    if strategy.needs_teacher and networks.teacher is None:
        raise ValueError(f"method {method!r} needs a teacher and teacher=None: pass a model")
    if wanting and networks.teacher is None:
        raise ValueError(
            f"method {method!r} needs a teacher for {', '.join(map(repr, wanting))} and "
            "teacher=None: pass a model, or leave these losses out"
        )
    if not (strategy.needs_teacher or wanting) and networks.teacher is not None:
        raise ValueError(
            f"method {method!r} uses no teacher, its networks teach each other: pass teacher=None, "
            "or name a loss of a teacher beside it, such as method=['kd', 'dml']"
        )
    if networks.teacher is None:
        _check_no_teacher_options(config, method)
    options = list(strategy.options)
    for loss in beside:
        options += keyword_options(loss.__init__)
    if config.loss.temperature is not None and "temperature" not in options:
        raise ValueError(f"temperature has no effect: method {method!r} has none")
    for name, value in (
        ("freeze", networks.freeze),
        ("layer_decay", config.optim.layer_decay),
    ):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for one student and its teachers, method {method!r} trains "
                "several networks: "
                "leave it out, or freeze parameters of a module that you pass yourself"
            )


def resolve_temperature(config: DistillConfig, resolved: ResolvedLosses | None) -> float | None:
    """The temperature of a run.

    Args:
        config: The configuration.
        resolved: Losses and options of the method; None for a `Method` that is already built.

    Returns:
        The given one; else the default of the method; None where the method has none, or several.
    """
    if config.loss.temperature is not None or resolved is None:
        return config.loss.temperature
    strategy_options = {} if resolved.strategy is None else resolved.strategy.options
    defaults = {
        options["temperature"]
        for name in resolved.names_to_build()
        if "temperature" in (options := keyword_defaults(LOSSES[name].__init__))
    }
    defaults |= {value for name, value in strategy_options.items() if name == "temperature"}
    return defaults.pop() if len(defaults) == 1 else None


def _check_built_method(method: Method, config: DistillConfig) -> None:
    """Check that nothing is configured that a Method which is already built brings itself."""
    values = config.flat()
    for name in BUILT_IN_METHOD:
        if values[name] is not None:
            raise _without_effect(name)
    options = config.loss.options or {}
    if options:
        raise _without_effect(next(iter(options)))
    if config.loss.layers != "auto":
        raise _without_effect("layers")
    if config.loss.temperature is not None:
        raise _without_effect("temperature")
    nets = method.networks()
    for name in ("freeze", "layer_decay"):
        if values[name] is not None and len(nets) > 1:
            raise ValueError(
                f"{name}={values[name]!r} is for one student, this Method trains "
                f"{', '.join(nets)}: leave it out, or "
                "freeze parameters of the networks that you pass"
            )
    student, first = config.networks.student, next(iter(nets.values()))
    if student is not None and student is not first:
        raise ValueError(
            f"student={_short_name(student)} is not the network that the Method trains "
            f"({type(first).__name__}): "
            "pass that network, or student=None"
        )
    inside = [teacher.model for teacher in method.teachers]
    teachers = as_list(config.networks.teacher)
    same = len(teachers) == len(inside) and all(
        t is m for t, m in zip(teachers, inside, strict=True)
    )
    if teachers and not same:
        raise ValueError(
            "teacher is not that of the Method, which is already built: pass teacher=None"
        )


def _without_effect(name: str) -> ValueError:
    return ValueError(
        f"{name} has no effect on a Method that is already built: give it to its constructor"
    )


def _short_name(source: Any) -> str:
    return repr(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__


def list_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """The callbacks that were given, checked to be objects of `Callback`.

    Args:
        callbacks: A list, tuple or iterator of callbacks; None is none.

    Returns:
        The callbacks in their order.

    Raises:
        ValueError: If it is no list, or holds what is no callback, such as a class that was not
            called, or one callback twice.
    """
    no_list = (Callback, str, bytes, Mapping, Tensor)
    if callbacks is None:
        return ()
    if isinstance(callbacks, no_list) or not isinstance(callbacks, Iterable):
        raise ValueError(
            f"callbacks is {describe_value(callbacks)}; allowed: a list of kdtoolkit.Callback "
            "objects, such as callbacks=[EarlyStop()]"
        )
    listed = tuple(callbacks)
    for number, callback in enumerate(listed):
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks holds {describe_value(callback)}: each must be a kdtoolkit.Callback, "
                "made by calling its class"
            )
        if any(callback is other for other in listed[:number]):
            raise ValueError(
                f"callbacks holds one object twice, {describe_value(callback)}: list it once"
            )
    return listed


def check_call(accelerator: object, dry_run: object) -> None:
    """Check the arguments of `distill()` that are no part of the configuration.

    Args:
        accelerator: What was given as the caller's accelerator.
        dry_run: What was given as `dry_run`.

    Raises:
        ValueError: If one has another type.
    """
    check_flag("dry_run", dry_run)
    if accelerator is not None and not isinstance(accelerator, Accelerator):
        raise ValueError(
            f"accelerator is {describe_value(accelerator)}; allowed: an accelerate.Accelerator, "
            "made by calling its class, or None"
        )


def check_data_options(config: DistillConfig) -> None:
    """Check the options of the data that need no data.

    Args:
        config: The configuration; its `data` is read.

    Raises:
        ValueError: For the first option that is not allowed, with what is.
    """
    data = config.data
    check_validation(data.validation)
    check_transforms(data.transforms)
    check_image_size(data.image_size)
    check_num_workers(data.num_workers)
    check_labelled(data.labelled)
    check_columns(data.columns)
    check_image_options(data.background, data.channels, data.pixel_range)


def make_progress_log(config: DistillConfig) -> ProgressLog:
    """The callback that prints the progress of a run.

    Args:
        config: The configuration; its `loop.progress` and `loop.label` are used.

    Returns:
        The callback, new.

    Raises:
        ValueError: If `progress` is not one of the modes.
    """
    progress = config.loop.progress
    if isinstance(progress, bool):
        progress = "auto" if progress else "off"
    return ProgressLog(progress, label=config.loop.label)


def check_baseline(config: DistillConfig) -> None:
    """Check that a baseline is there, or can be trained first.

    Raises:
        ValueError: If there is no run in the folder, no folder for the report, or no way to build
            the same student again.
    """
    baseline = config.output.baseline
    if baseline is None or baseline is False:
        return
    if config.output.output_dir is None and baseline is not True:
        raise ValueError("baseline has no effect without output_dir, where the report is written")
    if baseline is not True:
        _check_baseline_folder(baseline)
    elif config.output.output_dir is None or not isinstance(config.networks.student, str):
        raise ValueError(
            "baseline=True trains the student alone first: it needs output_dir and a student given "
            "by name"
        )


def _check_baseline_folder(baseline: Any) -> None:
    is_path = isinstance(baseline, (str, os.PathLike))
    folder = Path(baseline) if is_path else baseline.output_dir
    if folder is None:
        raise ValueError(
            "baseline is the result of a run without a folder, whose numbers the report cannot "
            "read: give that run an output_dir"
        )
    if not (Path(folder) / "metrics.jsonl").is_file():
        what = "holds no run (metrics.jsonl is missing)"
        if not Path(folder).is_dir():
            what = "is no folder"
        given = repr(os.fspath(baseline)) if is_path else f"the result of the run in {folder}"
        raise ValueError(
            f"baseline is {given}, which {what}; allowed: the folder of a finished run, its "
            "DistillResult, or True, which trains the student alone first"
        )


def check_method_fits_data(method: Method, data: Data | None, compiled: bool) -> None:
    """Check a method against the data and the way it is run.

    Args:
        method: The method.
        data: The data; None in a dry run of a known data set.
        compiled: Whether networks are compiled.

    Raises:
        ValueError: For unlabelled rows that the method cannot use, views that the data does not
            make, and networks that cannot be compiled.
    """
    if compiled and method.no_compile_reason:
        raise ValueError(f"compile=True: {method.no_compile_reason}; leave compile out")
    if data is None:
        return
    if method.num_views > 1 and data.augment is None:
        raise ValueError(
            f"this method sees {method.num_views} views of every image, and the data makes none "
            "(augmentation "
            f"{data.details.get('augmentation', 'none')}): pass transforms='crop-flip' or "
            "transforms=BatchAugment(...), "
            "or views=False where the method has that option"
        )
    if data.num_unlabelled and not method.uses_unlabelled:
        raise ValueError(
            f"{data.num_unlabelled} training rows have no label (-1), and this method learns from "
            "labels alone: remove "
            "these rows, number the classes from 0 if -1 is one of them, or use "
            "method='mean_teacher'"
        )


def channels_last_pays(student: nn.Module) -> bool:
    """Whether a network has 2-D convolutions, and no tied weights.

    accelerate cannot load tied weights in that layout.

    Args:
        student: The network.

    Returns:
        True if it has an `nn.Conv2d` and no parameter under two names.
    """
    names = list(student.named_parameters(remove_duplicate=False))
    tied = len(names) > len(list(student.parameters()))
    return not tied and any(isinstance(module, nn.Conv2d) for module in student.modules())
