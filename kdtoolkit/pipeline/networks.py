"""The networks of a run: student and teachers with weights and the right classes, or a refusal with the choices."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kdtoolkit import models
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess, config_of, input_shape
from kdtoolkit.models.head import num_outputs, replace_head

HEADS = ("finetune", "linear-probe", "feature-only", "as-is")
TRAINED = ("finetune", "linear-probe")  # with these a teacher of other classes gets a new head


def several(spec: Any) -> list[Any]:
    return [] if spec is None else list(spec) if isinstance(spec, (list, tuple)) else [spec]


def plain(net: nn.Module, image: tuple[int, int]) -> Taps:
    """The network as it sees images of the data, without hooks."""
    return Taps(net, None, Preprocess.of(net, image).size or image)


# ------------------------------------------------------------------------------------------------------------- student
def student(given: Mapping[str, Any], facts: Any, notes: list[str]) -> nn.Module:
    """The student that distill() was asked for, with facts.classes classes. What was done to it is added to `notes`."""
    spec, args, weights, dry = (
        given["student"],
        given["student_args"],
        given["student_weights"],
        given["dry_run"],
    )
    _no_options(spec, args, "student")
    named = models.is_timm_name(spec)
    load = False if dry or weights is not None else None
    classes = (
        facts.classes if named else None
    )  # others keep their own first: their weights need them
    net = models.load_model(
        spec, num_classes=classes, role="student", pretrained=load, **dict(args or {})
    )
    held = (
        config_of(net).get("num_classes")
        if named and "." in spec
        else getattr(net, "num_classes", None)
    )
    known = not isinstance(spec, nn.Module) and not (named and weights is not None)
    if known and held not in (None, facts.classes):
        notes.append(f"the student gets a new head of {facts.classes} classes in place of {held}")
        if not named:
            replace_head(plain(net, facts.image), facts.classes, given["seed"])
    if weights is not None:
        notes.append(models.load_weights(net, weights, role="student", load=not dry))
    return trainable(net, facts)


@contextlib.contextmanager
def unharmed(net: Any) -> Iterator[None]:
    """The caller's module keeps its weights where what follows is refused; None and names have none."""
    if not isinstance(net, nn.Module):
        yield
        return
    before, table = copy.deepcopy(net.state_dict()), getattr(net, "pretrained_cfg", None)
    try:
        yield
    except BaseException:
        net.load_state_dict(before)
        if table is not None:
            net.pretrained_cfg = table
        raise


def trainable(net: nn.Module, facts: Any) -> nn.Module:
    """`net`, if it can be trained on the data."""
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError(
            "every parameter of the student is frozen (requires_grad=False): nothing can be trained"
        )
    kinds = {
        str(p.dtype) for p in net.parameters() if p.is_floating_point() and p.dtype != torch.float32
    }
    if kinds:
        raise ValueError(
            f"the student has weights of {', '.join(sorted(kinds))}; trained are those of torch.float32: pass "
            'student.float(), and mixed_precision="bf16" for speed'
        )
    colours(net, "student")
    held = num_outputs(plain(net, facts.image))
    if held != facts.classes:
        raise ValueError(
            f"the student has {held} classes, the data {facts.classes}: build it with num_classes={facts.classes}"
        )
    return net


def colours(net: nn.Module, role: str) -> None:
    """ValueError unless the network takes images of three channels, which all data here has."""
    channels = input_shape(net)[0]
    if channels != 3:
        raise ValueError(
            f"the {role} takes images of {channels} channels, those of the data have 3 (grey ones are repeated): build "
            f"it with {role}_args={{'in_chans': 3}}"
        )


def _no_options(spec: Any, args: Any, role: str) -> None:
    if args and isinstance(spec, nn.Module):
        raise ValueError(
            f"{role}_args={dict(args)} has no effect on a network that is already built: pass its name"
        )


# ------------------------------------------------------------------------------------------------------------ teachers
def heads(given: Mapping[str, Any]) -> list[str | None]:
    """What is done to each teacher: teacher_head, given once for all or as a list."""
    count, asked = len(several(given["teacher"])), given["teacher_head"]
    each = list(asked) if isinstance(asked, (list, tuple)) else [asked] * max(count, 1)
    if isinstance(asked, (list, tuple)) and len(asked) != count:
        raise ValueError(
            f"teacher_head is a list of {len(asked)} for {count} teachers: one for each, None for none"
        )
    wrong = [head for head in each if head is not None and head not in HEADS]
    if wrong:
        raise ValueError(
            f"teacher_head={wrong[0]!r}; allowed: {', '.join(map(repr, HEADS))}, or a list, one a teacher"
        )
    return each


def teachers(
    frozen: list[Frozen],
    given: Mapping[str, Any],
    losses: Mapping[str, Any],
    facts: Any,
    trained: Any,
    student: nn.Module,
    notes: list[str],
) -> list[int]:
    """Fills `frozen`; returns the numbers of those that are trained first. The caller's own module is never changed: a
    copy.

    trained  teachers that are ready, in place of given["teacher"]
    """
    fresh = []
    specs = trained or several(given["teacher"])
    same = {
        name: [None] * len(specs) if trained else _each(given, name, len(specs))
        for name in PER_TEACHER
    }
    for number, spec in enumerate(specs):
        label = "the teacher" if len(specs) == 1 else f"teacher {number}"
        net = _teacher(
            spec, given, facts, same["teacher_args"][number], same["teacher_weights"][number], notes
        )
        apart(net, student)
        colours(net, "teacher")
        held = num_outputs(plain(net, facts.image))
        head = heads(given)[number]
        if head in TRAINED and not trained:
            net = copy.deepcopy(net) if net is spec else net
            if held != facts.classes:
                replace_head(plain(net, facts.image), facts.classes, given["seed"])
            fresh.append(number)
            notes.append(_told(label, held, facts.classes, head))
        pre = Preprocess.of(net, facts.image)
        teacher = Frozen(net, None, pre.size or facts.image, preprocess=pre)
        frozen.append(teacher)
        held = num_outputs(teacher)
        if held != facts.classes:
            _check_other(label, held, facts.classes, head, losses)
            teacher.scored = False  # type: ignore[attr-defined]
    return fresh


PER_TEACHER = ("teacher_args", "teacher_weights")


def _each(given: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """The argument for each teacher: a list of as many, or options that all of them get."""
    value = given[name]
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(
                f"{name} is a list of {len(value)} for {count} teachers: one for each, None for none"
            )
        return list(value)
    if name == "teacher_weights" and value is not None and count != 1:
        raise ValueError(
            f"{name} is given once for {count} teachers: pass a list, one for each, None for none"
        )
    return [value] * count


def _teacher(
    spec: Any, given: Mapping[str, Any], facts: Any, args: Any, weights: Any, notes: list[str]
) -> nn.Module:
    _no_options(spec, args, "teacher")
    dry, named = given["dry_run"], models.is_timm_name(spec)
    # weights of a name without a tag are those of the data in a dry run: what is downloaded then is not known here
    classes = {"num_classes": facts.classes} if dry and named and "." not in spec else {}
    load = False if dry or weights is not None else True if named else None
    net = models.load_model(spec, role="teacher", pretrained=load, **classes, **dict(args or {}))
    if weights is not None:
        net = copy.deepcopy(net) if net is spec else net
        notes.append(models.load_weights(net, weights, role="teacher", keep_head=True))
    return net


def _told(label: str, held: int, classes: int, head: str) -> str:
    if held == classes:
        return f"{label} keeps its head of {classes} classes, and is trained first ({head})"
    return f"{label} gets a new head of {classes} classes in place of {held}, which is trained first ({head})"


def _check_other(
    label: str, held: int, classes: int, head: str | None, losses: Mapping[str, Any]
) -> None:
    """ValueError for a teacher of other classes, unless only its features are used."""
    if head != "feature-only":
        raise ValueError(
            f"{label} has {held or 'no'} classes, the data {classes}: pass "
            + " | ".join(f'teacher_head="{h}"' for h in HEADS if h != head)
            + ' ("feature-only" goes with losses on features, such as fitnet, at and sp; "finetune" and '
            + '"linear-probe" train a new head first'
            + ("" if head == "as-is" else '; "as-is" insists that the classes are the same')
            + ")"
        )
    if "kd/branch" in losses:
        raise ValueError(
            "teacher_head='feature-only', but the branch of method 'sokd' learns from the teacher's logits: pass "
            "teacher_head='finetune' or 'linear-probe'"
        )
    if {"kd", "logits"} & set(losses):
        raise ValueError(
            f"teacher_head='feature-only', but the losses {', '.join(losses)} read the teacher's logits: "
            "leave kd out with losses={...}, or pass teacher_head='finetune'"
        )


def apart(teacher: nn.Module, student: nn.Module) -> None:
    """ValueError if the two have a parameter in common: it would be frozen and trained."""
    trained = {id(p) for p in student.parameters()}
    shared = [name for name, p in teacher.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"teacher and student share parameters ({len(shared)}, such as {shared[0]!r}), and a teacher is frozen: "
            "pass copy.deepcopy(...) of the network as one of them"
        )
