"""From names and numbers to the parts of a run: student, teachers, method. What can be wrong is found here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from kdtoolkit import data as data_room
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.factory import (
    check_losses,
    check_options,
    create_method,
    default_losses,
    find_strategy,
    needs_teacher,
)
from kdtoolkit.models.freezing import FrozenParts
from kdtoolkit.models.layer_groups import layer_numbers
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.pipeline import networks
from kdtoolkit.pipeline.networks import several
from kdtoolkit.types import LossWeight


class _Unsaid(float):
    """The default of a number, told from the same number when a user gives it."""


TEMPERATURE = _Unsaid(4.0)  # no unit


# -------------------------------------------------------------------------------------------------------------- checks
def check_names(
    given: Mapping[str, Any], options: Mapping[str, Any], known: Sequence[str]
) -> dict[str, LossWeight]:
    """The losses of a run and their weights; ValueError for a name or an option that nobody knows. Reads no data.

    given  the arguments of distill();  options  those that it passes on;  known  names of its own
    """
    method, teacher = given["method"], given["teacher"]
    networks.heads(given)
    if isinstance(method, Method):
        _check_own(method, given, options)
        return {}
    if given["student"] is None:
        raise ValueError("student=None: pass a model or a timm name, it is what is trained")
    if not isinstance(method, (str, list, tuple)):
        raise ValueError(
            f"method={method!r}: a name of list_methods(), a list of names or Objectives, or a Method"
        )
    own, strategy = _own(method), find_strategy(method)
    losses = dict(given["losses"]) if given["losses"] is not None else default_losses(method)
    check_losses(losses, own, strategy)
    try:
        check_options(losses, options, strategy=strategy)
    except ValueError as error:  # an option that no loss takes may be a misspelt argument
        near = {
            option: difflib.get_close_matches(option, known, 1, cutoff=0.75) for option in options
        }
        meant = next(((option, found[0]) for option, found in near.items() if found), None)
        raise (
            ValueError(f"unknown argument {meant[0]!r}; did you mean {meant[1]!r}?")
            if meant
            else error
        ) from None
    if strategy is not None:
        _check_team(strategy, given)
        return losses
    wanting = needs_teacher(losses, own)
    if wanting and teacher is None:
        raise ValueError(
            f"method {method!r} needs a teacher for {', '.join(map(repr, wanting))} and teacher=None: pass a model, "
            "or method='none' for plain training"
        )
    if not wanting and teacher is not None:
        raise ValueError(f"method {method!r} uses no teacher: pass teacher=None, or another method")
    return losses


def _check_team(strategy: StrategySpec, given: Mapping[str, Any]) -> None:
    method, teacher = given["method"], given["teacher"]
    if strategy.needs_teacher and teacher is None:
        raise ValueError(f"method {method!r} needs a teacher and teacher=None: pass a model")
    if not strategy.needs_teacher and teacher is not None:
        raise ValueError(
            f"method {method!r} uses no teacher, its networks teach each other: pass teacher=None"
        )
    for name in ("teacher_head", "teacher_args", "teacher_weights") if teacher is None else ():
        if given[name] is not None:
            raise ValueError(
                f"{name} has no effect: method {method!r} has no teacher; leave it out"
            )
    if given["temperature"] is not TEMPERATURE and "temperature" not in strategy.options:
        raise ValueError(f"temperature has no effect: method {method!r} has none")
    for name in ("freeze", "layer_decay"):
        if given[name] is not None:
            raise ValueError(
                f"{name}={given[name]!r} is for a student under losses, method {method!r} builds a team: leave it out, "
                "or freeze parameters of a module that you pass yourself"
            )


def temperature_of(given: Mapping[str, Any]) -> float | None:
    """That of the run: a strategy has its paper's where none is given, or has none."""
    strategy = None if isinstance(given["method"], Method) else find_strategy(given["method"])
    said = strategy is None or given["temperature"] is not TEMPERATURE
    return given["temperature"] if said else strategy.options.get("temperature")  # type: ignore[union-attr]


def resolved(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run with the defaults of its strategy; the temperature is an argument of its own."""
    strategy = None if isinstance(method, Method) else find_strategy(method)
    defaults = (
        {}
        if strategy is None
        else {k: v for k, v in strategy.options.items() if k != "temperature"}
    )
    return {**defaults, **options}


def check_run(method: Method, data: Any, compiled: bool) -> None:
    """ValueError for unlabelled training rows that the method has no use for, and for what cannot be compiled."""
    if compiled and method.no_compile_reason:
        raise ValueError(f"compile=True: {method.no_compile_reason}; leave compile out")
    if method.num_views > 1 and data is not None and data.augment is None:
        raise ValueError(
            f"this method sees {method.num_views} views of every image, and the data makes none (augmentation "
            f"{data.notes.get('augmentation', 'none')}): pass transforms='crop-flip' or transforms=BatchAugment(...), "
            "or views=False where the method has that option"
        )
    if data is not None and data.unlabelled and not method.uses_unlabelled:
        raise ValueError(
            f"{data.unlabelled} training rows have no label (-1), and this method learns from labels alone: remove "
            "these rows, or use method='mean_teacher'"
        )


def _own(method: Any) -> list[DistillationLoss]:
    return [] if isinstance(method, str) else [m for m in method if isinstance(m, DistillationLoss)]


def _check_own(method: Method, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """A Method that is already built brings its networks, losses and options."""
    for (
        name
    ) in "losses teacher_head student_args teacher_args student_weights teacher_weights".split():
        if given[name] is not None:
            raise ValueError(
                f"{name} has no effect on a Method that is already built: give it to its constructor"
            )
    if options or given["layers"] != "auto" or given["temperature"] is not TEMPERATURE:
        name = next(iter(options), "layers" if given["layers"] != "auto" else "temperature")
        raise ValueError(
            f"{name} has no effect on a Method that is already built: give it to its constructor"
        )
    nets = method.networks()
    product = next(iter(nets.values()))
    for name in ("freeze", "layer_decay"):
        if given[name] is not None and len(nets) > 1:
            raise ValueError(
                f"{name}={given[name]!r} is for one student, this Method trains {', '.join(nets)}: leave it out, or "
                "freeze parameters of the networks that you pass"
            )
    if given["student"] is not None and given["student"] is not product:
        raise ValueError(
            f"student={_named(given['student'])} is not the network that the Method trains ({type(product).__name__}): "
            "pass that network, or student=None"
        )
    inside = [t.model for t in method.teachers]
    teachers = several(given["teacher"])
    if teachers and not (
        len(teachers) == len(inside) and all(t is m for t, m in zip(teachers, inside, strict=True))
    ):
        raise ValueError(
            "teacher is not that of the Method, which is already built: pass teacher=None"
        )


def _named(spec: Any) -> str:
    return repr(spec) if isinstance(spec, (str, os.PathLike)) else type(spec).__name__


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class DataInfo:
    """What the models need to know of the data; a dry run of a preset reads no data."""

    classes: int
    image: tuple[int, int]
    data: Any
    describe: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> DataInfo:
        train_data = given["train_data"]
        preset = data_room.PRESETS.get(train_data) if isinstance(train_data, str) else None
        if given["dry_run"] and preset is not None:
            classes, side = given["num_classes"] or preset.num_classes, given["image_size"]
            size = preset.size if side is None else (side, side)
            told = {"name": train_data, "num_classes": classes, "image_size": size}
            return cls(classes, size, None, told | {"augmentation": str(preset.augment)})
        names = "seed validation transforms num_classes num_workers image_size data_path train_limit labelled".split()
        loaded = data_room.load(train_data, given["eval_data"], **{n: given[n] for n in names})
        return cls(loaded.num_classes, loaded.image_size, loaded, loaded.describe())


# --------------------------------------------------------------------------------------------------------------- parts
@dataclass
class RunParts:
    """Networks and the method that trains them.

    to_adapt  numbers of the teachers that got a new head, which must be trained before they teach
    notes     what was done to the networks, for the plan
    still     what of the student is not trained, or None;  layers  parameter -> layer, for layer_decay
    extra     further numbers for the result, such as those of a fine-tuned teacher
    """

    net: nn.Module
    teachers: list[Frozen]
    method: Method
    to_adapt: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    still: FrozenParts | None = None
    layers: dict[str, int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def release(self) -> None:
        """Every network without hooks, flags and modes as they were."""
        self.method.release()
        for teacher in reversed(self.teachers):
            teacher.release()
        if self.still is not None:
            self.still.release()


def build(
    given: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    options: Mapping[str, Any],
    facts: DataInfo,
    teachers: Any = None,
) -> RunParts:
    """Student, teachers and method. The student's first weights depend on the seed alone; a dry run has no weights.

    teachers  teachers whose heads were trained, in place of given["teacher"]
    """
    with networks.unharmed(given["student"] if given["student_weights"] is not None else None):
        return _built(given, losses, options, facts, teachers)


def _built(
    given: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    options: Mapping[str, Any],
    facts: DataInfo,
    teachers: Any,
) -> RunParts:
    if isinstance(given["method"], Method):
        parts = _own_parts(given["method"], facts)
    else:
        with torch.device("meta" if given["dry_run"] else "cpu"):
            set_seed(given["seed"])
            parts = _named_parts(given, losses, options, facts, teachers)
    taps = networks.plain(parts.net, facts.image)
    try:
        parts.layers = layer_numbers(taps) if given["layer_decay"] is not None else None
        parts.still = FrozenParts(taps, given["freeze"]) if given["freeze"] is not None else None
    except BaseException:
        parts.release()
        raise
    if parts.still is not None:
        parts.still.apply()
    return parts


def _own_parts(method: Method, facts: DataInfo) -> RunParts:
    """Those of a Method that the caller has built."""
    nets = method.networks()
    for teacher in method.teachers:
        networks.apart(teacher.model, next(iter(nets.values())))
    for name, net in nets.items():
        try:
            networks.trainable(net, facts)
        except ValueError as error:
            raise (error if len(nets) == 1 else ValueError(f"network {name!r}: {error}")) from None
    return RunParts(next(iter(nets.values())), list(method.teachers), method)


def _named_parts(
    given: Mapping[str, Any],
    losses: Mapping[str, LossWeight],
    options: Mapping[str, Any],
    facts: DataInfo,
    trained: Any,
) -> RunParts:
    notes: list[str] = []
    frozen: list[Frozen] = []
    taps = None
    net = networks.student(given, facts, notes)
    try:
        to_adapt = networks.teachers(frozen, given, losses, facts, trained, net, notes)
        pre = Preprocess.of(net, facts.image)
        taps = Taps(net, None, pre.size or facts.image)
        heat, named = (
            given["temperature"],
            find_strategy(given["method"]) is None and "kd" in losses,
        )
        wanted = named or (heat is not None and heat is not TEMPERATURE)
        options = dict(options) | ({"temperature": heat} if wanted else {})
        options["another"] = _another(given, facts, notes)
        options |= {
            "losses": losses,
            "layers": given["layers"],
            "preprocess": pre,
            "image": facts.image,
        }
        method = create_method(given["method"], taps, frozen, **options)
    except BaseException:
        for part in (taps, *frozen):
            if part is not None:
                part.remove() if part is taps else part.release()  # type: ignore[attr-defined]
        raise
    return RunParts(net, frozen, method, to_adapt, notes)


def _another(
    given: Mapping[str, Any], facts: DataInfo, notes: list[str]
) -> Callable[..., nn.Module]:
    """Further networks of a team: the student built again, or another source, with first weights of seed + k."""

    def another(k: int, spec: Any = None) -> nn.Module:
        if spec is None and isinstance(given["student"], nn.Module):
            notes.append(
                f"network {k} is a copy of the student's module with weights drawn anew (but frozen ones)"
            )
            return reinitialised_copy(given["student"], given["seed"] + k)
        if isinstance(spec, nn.Module):
            return networks.trainable(spec, facts)
        own = (
            given
            if spec is None
            else {**given, "student": spec, "student_args": None, "student_weights": None}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(given["seed"] + k)
            return networks.student({**own, "seed": given["seed"] + k}, facts, [])

    return another
