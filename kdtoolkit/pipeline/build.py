"""Networks and the method that trains them, from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from kdtoolkit.core.method import Method
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.factory import create_method
from kdtoolkit.methods.resolve import ResolvedLosses
from kdtoolkit.models.freezing import FrozenParts
from kdtoolkit.models.layer_groups import layer_numbers
from kdtoolkit.models.module_checks import check_module
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.pipeline.class_order import match_class_order
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.data_info import DataInfo
from kdtoolkit.pipeline.networks import (
    build_student,
    check_trainable,
    untapped,
    weights_restored_on_error,
)
from kdtoolkit.pipeline.teachers import build_teachers, check_no_shared_parameters


@dataclass
class RunParts:
    """Networks of a run, and the method that trains them.

    Attributes:
        student: The first network that is trained.
        teachers: Frozen teachers.
        method: Owns every trained parameter.
        to_finetune: Numbers of the teachers that must be fine-tuned before they teach.
        notes: What was done to the networks, for the plan.
        frozen_parts: What of the student is not trained; None where all is.
        parameter_layers: Parameter of the student -> number of its layer, for `layer_decay`.
        extra_metrics: Further numbers for the result, such as those of a fine-tuned teacher.
    """

    student: nn.Module
    teachers: list[Frozen]
    method: Method
    to_finetune: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frozen_parts: FrozenParts | None = None
    parameter_layers: dict[str, int] | None = None
    extra_metrics: dict[str, Any] = field(default_factory=dict)

    def release(self) -> None:
        """Take hooks off every network, and restore flags and modes."""
        self.method.release()
        for teacher in reversed(self.teachers):
            teacher.release()
        if self.frozen_parts is not None:
            self.frozen_parts.release()


def build_parts(
    config: DistillConfig,
    resolved: ResolvedLosses | None,
    info: DataInfo,
    *,
    dry_run: bool,
    finetuned: Sequence[nn.Module] | None = None,
) -> RunParts:
    """Build student, teachers and method. The student's first weights depend on the seed alone.

    Args:
        config: The configuration.
        resolved: Losses and options of the method; None for a `Method` that is already built.
        info: The data.
        dry_run: Whether networks are built without weights.
        finetuned: Teachers whose heads are trained, in place of those that the configuration names.

    Returns:
        The parts, with hooks; release them at the end.
    """
    networks = config.networks
    is_changed = networks.student_weights is not None or "redraw" in (config.loss.options or {})
    with weights_restored_on_error(networks.student if is_changed else None):
        if isinstance(config.loss.method, Method):
            parts = _parts_of_method(config.loss.method, info)
        else:
            assert resolved is not None
            with torch.device("meta" if dry_run else "cpu"):
                set_seed(config.loop.seed)
                parts = _parts_by_name(config, resolved, info, dry_run, finetuned)
        return _with_frozen_parts(parts, config, info)


def _with_frozen_parts(parts: RunParts, config: DistillConfig, info: DataInfo) -> RunParts:
    taps = untapped(parts.student, info.image_size)
    try:
        if config.optim.layer_decay is not None:
            parts.parameter_layers = layer_numbers(taps)
        if config.networks.freeze is not None:
            parts.frozen_parts = FrozenParts(taps, config.networks.freeze)
    except BaseException:
        parts.release()
        raise
    if parts.frozen_parts is not None:
        parts.frozen_parts.apply()
    return parts


def _parts_of_method(method: Method, info: DataInfo) -> RunParts:
    """The parts of a Method that the caller has built."""
    notes: list[str] = []
    nets = method.networks()
    first = next(iter(nets.values()))
    for teacher in method.teachers:
        check_no_shared_parameters(teacher.model, first)
        match_class_order(
            teacher, info.class_names, label="the teacher", head=None, is_callers=True,
            notes=notes, can_change=False,
        )  # fmt: skip
    for name, net in nets.items():
        _check_named(net, info, name if len(nets) > 1 else None)
    return RunParts(first, list(method.teachers), method, notes=notes)


def _check_named(net: nn.Module, info: DataInfo, name: str | None) -> None:
    """Check a network; the message names it, where it is one of several."""
    try:
        check_trainable(check_module(net, "network"), info)
    except ValueError as error:
        if name is None:
            raise
        raise ValueError(f"network {name!r}: {error}") from None


def _parts_by_name(
    config: DistillConfig,
    resolved: ResolvedLosses,
    info: DataInfo,
    dry_run: bool,
    finetuned: Sequence[nn.Module] | None,
) -> RunParts:
    notes: list[str] = []
    frozen: list[Frozen] = []
    taps: Taps | None = None
    networks, seed = config.networks, config.loop.seed
    student = build_student(networks, info, seed, notes, dry_run=dry_run)
    try:
        to_finetune = build_teachers(
            frozen, networks, info, list(resolved.weights), student, notes,
            seed=seed, dry_run=dry_run, finetuned=finetuned,
        )  # fmt: skip
        preprocess = Preprocess.from_model(student, info.image_size)
        taps = Taps(student, None, preprocess.size or info.image_size)
        method = create_method(
            resolved, taps, frozen, layers=config.loss.layers, preprocess=preprocess,
            image=info.image_size, make_network=_network_maker(config, info, notes, dry_run),
        )  # fmt: skip
    except BaseException:
        if taps is not None:
            taps.remove_hooks()
        for teacher in frozen:
            teacher.release()
        raise
    return RunParts(student, frozen, method, to_finetune, notes)


def _network_maker(
    config: DistillConfig, info: DataInfo, notes: list[str], dry_run: bool
) -> Callable[..., nn.Module]:
    """Makes network k of a strategy: the student again, or another source, with seed + k."""

    def make_network(k: int, source: Any = None) -> nn.Module:
        student, seed = config.networks.student, config.loop.seed + k
        if source is None and isinstance(student, nn.Module):
            notes.append(
                f"network {k} is a copy of the student's module with re-initialised weights "
                "(except frozen ones)"
            )
            return reinitialised_copy(student, seed)
        if isinstance(source, nn.Module):
            return check_trainable(check_module(source, f"network {k}"), info)
        networks = config.networks
        if source is not None:
            networks = replace(networks, student=source, student_args=None, student_weights=None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_student(networks, info, seed, [], dry_run=dry_run)

    return make_network
