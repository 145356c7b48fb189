"""From names and numbers to the parts of a run: student, teachers, method, plan. What can be wrong is found here."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from . import data as data_room
from . import models
from .method import Method, Objective
from .methods import create_method, default_losses
from .methods.create import check_losses, check_options, needs_teacher
from .plan import Plan
from .preprocess import Preprocess
from .taps import Frozen, Taps
from .types import Weight

HEADS = ("finetune", "linear-probe", "feature-only", "as-is")
TEMPERATURE = 4.0  # no unit


# -------------------------------------------------------------------------------------------------------------- checks
def check_names(given: Mapping[str, Any], options: Mapping[str, Any], known: Sequence[str]) -> dict[str, Weight]:
    """The losses of a run and their weights; ValueError for a name or an option that nobody knows. Reads no data.

    given  the arguments of distill();  options  those that it passes on;  known  names of its own
    """
    method, teacher, head = given["method"], given["teacher"], given["teacher_head"]
    if head is not None and head not in HEADS:
        raise ValueError(f"teacher_head={head!r}; allowed: {', '.join(map(repr, HEADS))}")
    if isinstance(method, Method):
        _check_own(method, given, options)
        return {}
    if given["student"] is None:
        raise ValueError("student=None: pass a model or a timm name, it is what is trained")
    if not isinstance(method, (str, list, tuple)):
        raise ValueError(f"method={method!r}: a name of list_methods(), a list of names or Objectives, or a Method")
    own = _own(method)
    losses = dict(given["losses"]) if given["losses"] is not None else default_losses(method)
    check_losses(losses, own)
    try:
        check_options(losses, options)
    except ValueError as error:  # an option that no loss takes may be a misspelt argument
        near = {option: difflib.get_close_matches(option, known, 1, cutoff=0.75) for option in options}
        meant = next(((option, found[0]) for option, found in near.items() if found), None)
        raise (ValueError(f"unknown argument {meant[0]!r}; did you mean {meant[1]!r}?") if meant else error) from None
    wanting = needs_teacher(losses, own)
    if wanting and teacher is None:
        raise ValueError(
            f"method {method!r} needs a teacher for {', '.join(map(repr, wanting))} and teacher=None: pass a model, "
            "or method='none' for plain training"
        )
    if not wanting and teacher is not None:
        raise ValueError(f"method {method!r} uses no teacher: pass teacher=None, or another method")
    return losses


def _own(method: Any) -> list[Objective]:
    return [] if isinstance(method, str) else [m for m in method if isinstance(m, Objective)]


def _check_own(method: Method, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """A Method that is already built brings its networks, losses and options."""
    for name in ("losses", "teacher_head", "student_args", "teacher_args"):
        if given[name] is not None:
            raise ValueError(f"{name} has no effect on a Method that is already built: give it to its constructor")
    if options or given["layers"] != "auto":
        name = next(iter(options), "layers")
        raise ValueError(f"{name} has no effect on a Method that is already built: give it to its constructor")
    product = next(iter(method.networks().values()))
    if given["student"] is not None and given["student"] is not product:
        raise ValueError(
            f"student={_named(given['student'])} is not the network that the Method trains ({type(product).__name__}): "
            "pass that network, or student=None"
        )
    inside = [t.model for t in method.teachers]
    teachers = _several(given["teacher"])
    if teachers and not (len(teachers) == len(inside) and all(t is m for t, m in zip(teachers, inside, strict=True))):
        raise ValueError("teacher is not that of the Method, which is already built: pass teacher=None")


def _named(spec: Any) -> str:
    return repr(spec) if isinstance(spec, (str, os.PathLike)) else type(spec).__name__


def _several(spec: Any) -> list[Any]:
    return [] if spec is None else list(spec) if isinstance(spec, (list, tuple)) else [spec]


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class Facts:
    """What the models need to know of the data; a dry run of a preset reads no data."""

    classes: int
    image: tuple[int, int]
    data: Any
    describe: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Facts:
        train_data = given["train_data"]
        preset = data_room.PRESETS.get(train_data) if isinstance(train_data, str) else None
        if given["dry_run"] and preset is not None and given["image_size"] is None:
            classes = given["num_classes"] or preset.num_classes
            told = {"name": train_data, "num_classes": classes, "image_size": preset.size}
            return cls(classes, preset.size, None, told | {"augmentation": str(preset.augment)})
        names = "seed validation transforms num_classes num_workers image_size data_path train_limit".split()
        loaded = data_room.load(train_data, given["eval_data"], **{n: given[n] for n in names})
        return cls(loaded.num_classes, loaded.image_size, loaded, loaded.describe())


# --------------------------------------------------------------------------------------------------------------- parts
@dataclass
class Parts:
    """Networks and the method that trains them.

    to_adapt  numbers of the teachers that got a new head, which must be trained before they teach
    """

    net: nn.Module
    teachers: list[Frozen]
    method: Method
    to_adapt: list[int] = field(default_factory=list)

    def release(self) -> None:
        """Every network without hooks, flags and modes as they were."""
        self.method.release()
        for teacher in self.teachers:
            teacher.release()


def build(
    given: Mapping[str, Any],
    losses: Mapping[str, Weight],
    options: Mapping[str, Any],
    facts: Facts,
    teachers: Any = None,
) -> Parts:
    """Student, teachers and method. The student's first weights depend on the seed alone; a dry run has no weights.

    teachers  teachers whose heads were trained, in place of given["teacher"]
    """
    method, dry = given["method"], given["dry_run"]
    if isinstance(method, Method):
        net = next(iter(method.networks().values()))
        for teacher in method.teachers:
            _apart(teacher.model, net)
        return Parts(_trainable(net, facts), list(method.teachers), method)
    frozen: list[Frozen] = []
    taps = None
    with torch.device("meta" if dry else "cpu"):
        set_seed(given["seed"])
        args = dict(given["student_args"] or {})
        pretrained = False if dry else None
        spec = given["student"]
        net = models.build(spec, num_classes=facts.classes, role="student", pretrained=pretrained, **args)
        _trainable(net, facts)
        try:
            to_adapt = _teachers(frozen, given, losses, facts, teachers, net)
            pre = Preprocess.of(net, facts.image)
            taps = Taps(net, None, pre.size or facts.image)
            wanted = "kd" in losses or given["temperature"] != TEMPERATURE
            options = dict(options) | ({"temperature": given["temperature"]} if wanted else {})
            built = create_method(
                method,
                taps,
                frozen,
                losses=losses,
                layers=given["layers"],
                preprocess=pre,
                image=facts.image,
                **options,
            )
        except BaseException:
            for part in (taps, *frozen):
                if part is not None:
                    part.remove() if part is taps else part.release()  # type: ignore[attr-defined]
            raise
    return Parts(net, frozen, built, to_adapt)


def _trainable(net: nn.Module, facts: Facts) -> nn.Module:
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("every parameter of the student is frozen (requires_grad=False): nothing can be trained")
    kinds = {str(p.dtype) for p in net.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if kinds:
        raise ValueError(
            f"the student has weights of {', '.join(sorted(kinds))}; trained are those of torch.float32: pass "
            'student.float(), and mixed_precision="bf16" for speed'
        )
    outputs = _outputs(_plain(net, facts))
    if outputs != facts.classes:
        raise ValueError(
            f"the student has {outputs} classes, the data {facts.classes}: build it with num_classes={facts.classes}"
        )
    return net


def _apart(teacher: nn.Module, student: nn.Module) -> None:
    """ValueError if the two have a parameter in common: it would be frozen and trained."""
    trained = {id(p) for p in student.parameters()}
    shared = [name for name, p in teacher.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"teacher and student share parameters ({len(shared)}, such as {shared[0]!r}), and a teacher is frozen: "
            "pass copy.deepcopy(...) of the network as one of them"
        )


def _teachers(
    frozen: list[Frozen],
    given: Mapping[str, Any],
    losses: Mapping[str, Weight],
    facts: Facts,
    trained: Any,
    student: nn.Module,
) -> list[int]:
    """Fills `frozen`; returns the numbers of those with a new head. The caller's own module never gets one: a copy."""
    dry, head, fresh = given["dry_run"], given["teacher_head"], []
    for number, spec in enumerate(trained or _several(given["teacher"])):
        named = isinstance(spec, str) and not spec.endswith(".safetensors") and ":" not in spec
        named = named and not Path(str(spec)).exists()
        # weights of a name without a tag are those of the data in a dry run: what is downloaded then is not known here
        classes = {"num_classes": facts.classes} if dry and named and "." not in str(spec) else {}
        pretrained = False if dry else True if named else None
        net = models.build(spec, role="teacher", pretrained=pretrained, **classes, **dict(given["teacher_args"] or {}))
        _apart(net, student)
        if head in ("finetune", "linear-probe") and _outputs(_plain(net, facts)) != facts.classes:
            if not hasattr(net, "reset_classifier"):
                raise ValueError(
                    f"teacher_head={head!r} needs a timm model; {type(net).__name__} has no reset_classifier"
                )
            net = copy.deepcopy(net) if net is spec else net
            with torch.device("meta" if next(net.parameters()).is_meta else "cpu"):  # a real module in a dry run
                net.reset_classifier(facts.classes)  # type: ignore[operator]
            fresh.append(number)
        pre = Preprocess.of(net, facts.image)
        teacher = Frozen(net, None, pre.size or facts.image, preprocess=pre)
        frozen.append(teacher)
        outputs = _outputs(teacher)
        if outputs == facts.classes:
            continue
        if head != "feature-only":
            raise ValueError(
                f"the teacher has {outputs} classes, the data {facts.classes}: pass "
                + " | ".join(f'teacher_head="{h}"' for h in HEADS if h != head)
                + ' ("feature-only" goes with losses on features, such as fitnet, at and sp; "finetune" and '
                + '"linear-probe" train a new head first'
                + ("" if head == "as-is" else '; "as-is" insists that the classes are the same')
                + ")"
            )
        if {"kd", "logits"} & set(losses):
            raise ValueError(
                f"teacher_head='feature-only', but the losses {', '.join(losses)} read the teacher's logits: "
                "leave kd out with losses={...}, or pass teacher_head='finetune'"
            )
        teacher.scored = False  # type: ignore[attr-defined]
    return fresh


def _plain(net: nn.Module, facts: Facts) -> Taps:
    return Taps(net, None, Preprocess.of(net, facts.image).size or facts.image)


def _outputs(taps: Taps) -> int:
    """Number of classes: what a timm model says of itself, of other modules the shape of the logits."""
    known = getattr(taps.model, "num_classes", None)
    if isinstance(known, int) and hasattr(taps.model, "pretrained_cfg") and hasattr(taps.model, "reset_classifier"):
        return known
    logits = taps.trace.logits
    if not taps.trace.bare_logits or len(logits) != 1 or logits[0].dim() != 2:
        raise ValueError(
            f"{type(taps.model).__name__} returns {[tuple(t.shape) for t in logits]}: "
            "logits must be one tensor (B, classes)"
        )
    return int(logits[0].shape[1])


# ---------------------------------------------------------------------------------------------------------------- told
def plan_of(parts: Parts, facts: Facts, settings: Any) -> Plan:
    plan, s = Plan(parts.method.plan()), settings
    nets = {"student": parts.net}
    nets |= {"teacher" if len(parts.teachers) == 1 else f"teacher/{i}": t.model for i, t in enumerate(parts.teachers)}
    plan["models"] = {
        role: getattr(net, "pretrained_cfg", {}).get("architecture") or type(net).__name__ for role, net in nets.items()
    }
    plan["data"] = facts.describe
    plan["schedule"] = {
        "length": f"{s.max_steps} steps" if s.max_steps else f"{s.epochs} epochs", "batch_size": s.batch_size,
        "optimizer": s.optimizer, "lr": s.lr, "weight_decay": s.weight_decay, "scheduler": s.scheduler,
    }  # fmt: skip
    if parts.to_adapt:
        plan["notes"] = [*plan.get("notes", []), "the teacher gets a new head, which is trained first"]
    return plan


def config_of(
    given: Mapping[str, Any], options: Mapping[str, Any], losses: Mapping[str, Weight], settings: Any
) -> dict[str, Any]:
    """Every argument of distill() as it was resolved, for config.yaml."""
    config = {n: told(v) for n, v in given.items() if n not in NOT_TOLD}
    config |= {k: getattr(settings, k) for k in ("epochs", "max_steps", "lr", "weight_decay", "batch_size")}
    config["losses"] = {k: v if isinstance(v, (int, float)) else repr(v) for k, v in losses.items()}
    config["callbacks"] = [type(c).__name__ for c in given["callbacks"]]
    return config | {k: told(v) for k, v in options.items()}


NOT_TOLD = ("accelerator", "dry_run", "callbacks", "resume", "overwrite", "method_options")


def card_of(given: Mapping[str, Any], losses: Mapping[str, Weight]) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    weights = {k: str(v) for k, v in losses.items()}
    return {"method": str(told(given["method"])), "losses": weights, "networks": {"student": told(given["student"])}}


def told(value: Any) -> Any:
    """Plain values; of an object only its class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [told(v) for v in value]
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return {str(k): told(v) for k, v in value.items()}
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
