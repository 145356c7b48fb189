"""Checks of a configuration that need no weights and no data."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn

from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.methods.resolve import ResolvedLosses, find_strategy, resolve_losses
from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig
from kdtoolkit.pipeline.networks import as_list
from kdtoolkit.pipeline.teachers import check_head_names
from kdtoolkit.utils.registry import keyword_defaults

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    if not isinstance(method, (str, list, tuple)):
        raise ValueError(
            f"method={method!r}: a name of list_methods(), a list of names or DistillationLoss "
            "objects, or a Method"
        )
    wrong = [part for part in method if not isinstance(part, (str, DistillationLoss))]
    if not isinstance(method, str) and wrong:
        raise ValueError(
            f"method holds {wrong[0]!r}: names and DistillationLoss objects are allowed"
        )
    strategy, options = find_strategy(method), dict(config.loss.options or {})
    if strategy is not None:
        _check_strategy(strategy, config)
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
    if not wanting and teacher is not None:
        raise ValueError(f"method {method!r} uses no teacher: pass teacher=None, or another method")


def _check_strategy(strategy: StrategySpec, config: DistillConfig) -> None:
    method, networks = config.loss.method, config.networks
    if strategy.needs_teacher and networks.teacher is None:
        raise ValueError(f"method {method!r} needs a teacher and teacher=None: pass a model")
    if not strategy.needs_teacher and networks.teacher is not None:
        raise ValueError(
            f"method {method!r} uses no teacher, its networks teach each other: pass teacher=None"
        )
    if networks.teacher is None:
        for name in ("teacher_head", "teacher_args", "teacher_weights"):
            if getattr(networks, name) is not None:
                raise ValueError(
                    f"{name} has no effect: method {method!r} has no teacher; leave it out"
                )
    if config.loss.temperature is not None and "temperature" not in strategy.options:
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
    if resolved.strategy is not None:
        return resolved.strategy.options.get("temperature")
    defaults = {
        options["temperature"]
        for name in resolved.names_to_build()
        if "temperature" in (options := keyword_defaults(LOSSES[name].__init__))
    }
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


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check that callbacks are objects of `Callback`.

    Raises:
        ValueError: If one is not, such as a class that was not called.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks holds {callback!r}: each must be a kdtoolkit.Callback, made by calling "
                "its class"
            )


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
    """Check that a baseline can be trained first, where that is wanted.

    Raises:
        ValueError: If there is no folder for it, or no way to build the same student again.
    """
    wanted = config.output.baseline is True
    if wanted and (
        config.output.output_dir is None or not isinstance(config.networks.student, str)
    ):
        raise ValueError(
            "baseline=True trains the student alone first: it needs output_dir and a student given "
            "by name"
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
            "these rows, or use method='mean_teacher'"
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
