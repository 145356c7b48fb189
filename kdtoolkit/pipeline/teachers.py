"""The teachers of a run: frozen networks with weights and the right classes, or an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.copying import copy_network
from kdtoolkit.models.head import num_outputs, replace_head
from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.source_paths import student_of_run
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline.class_order import match_class_order
from kdtoolkit.pipeline.config import TEACHER_HEADS, NetworksConfig
from kdtoolkit.pipeline.data_info import DataInfo
from kdtoolkit.pipeline.networks import (
    as_list,
    check_input_channels,
    check_options,
    check_usable,
    untapped,
    with_channels,
)

# with these a teacher of other classes gets a new head
TRAINED_HEADS = ("finetune", "linear-probe")


def check_head_names(networks: NetworksConfig) -> list[str | None]:
    """What is done to each teacher.

    Args:
        networks: `teacher_head` says it once for all teachers, or as a list.

    Returns:
        One entry a teacher (one where there is none).

    Raises:
        ValueError: For an unknown choice, or a list of another length.
    """
    count, heads = len(as_list(networks.teacher)), networks.teacher_head
    one_each = isinstance(heads, (list, tuple))
    each: list[str | None] = list(heads) if one_each else [heads] * max(count, 1)  # type: ignore[list-item, arg-type]
    if one_each and len(each) != count:
        raise ValueError(
            f"teacher_head is a list of {len(each)} for {count} teachers: one for each, None for "
            "none"
        )
    wrong = [head for head in each if head is not None and head not in TEACHER_HEADS]
    if wrong:
        allowed = ", ".join(map(repr, TEACHER_HEADS))
        raise ValueError(f"teacher_head={wrong[0]!r}; allowed: {allowed}, or a list, one a teacher")
    return each


def build_teachers(
    frozen: list[Frozen],
    networks: NetworksConfig,
    info: DataInfo,
    losses: Sequence[str],
    student: nn.Module,
    notes: list[str],
    *,
    seed: int,
    dry_run: bool,
    finetuned: Sequence[nn.Module] | None = None,
) -> list[int]:
    """Build the teachers of a run. A module that the caller passed is never changed: a copy is.

    Args:
        frozen: The teachers are appended, so that the caller can restore those that exist if this
            raises.
        networks: Where they come from.
        info: The data.
        losses: Names of the losses, to see whether they read a teacher's logits.
        student: Shares no parameter with a teacher.
        notes: What was done to the networks is appended, for the plan.
        seed: Of new heads.
        dry_run: Whether weights are left unread.
        finetuned: Teachers whose heads are trained, in place of those that `networks` names.

    Returns:
        Numbers of the teachers that must be fine-tuned before they teach.
    """
    to_finetune: list[int] = []
    sources = list(finetuned) if finetuned else as_list(networks.teacher)
    heads = check_head_names(networks)
    none = [None] * len(sources)
    options = none if finetuned else _each(networks.teacher_args, "teacher_args", len(sources))
    weights = (
        none if finetuned else _each(networks.teacher_weights, "teacher_weights", len(sources))
    )
    for number, source in enumerate(sources):
        label = "the teacher" if len(sources) == 1 else f"teacher {number}"
        head = heads[number]
        net = _load_teacher(
            source, options[number], weights[number], head, info, notes, dry_run=dry_run
        )
        check_no_shared_parameters(net, student)
        check_input_channels(net, "teacher", info.channels)
        if not finetuned:
            taps, is_callers = untapped(net, info.image_size), net is source
            net = match_class_order(
                taps, info.class_names, label=label, head=head, is_callers=is_callers, notes=notes
            )
        held = num_outputs(untapped(net, info.image_size))
        if head in TRAINED_HEADS and not finetuned:
            net = copy_network(net) if net is source else net
            if held != info.num_classes:
                replace_head(untapped(net, info.image_size), info.num_classes, seed)
            to_finetune.append(number)
            notes.append(_head_note(label, held, info.num_classes, head))
        preprocess = Preprocess.from_model(net, info.image_size)
        teacher = Frozen(net, None, preprocess.size or info.image_size, preprocess=preprocess)
        frozen.append(teacher)
        held = num_outputs(teacher)
        if held != info.num_classes:
            _check_features_only(label, held, info.num_classes, head, losses)
            teacher.has_data_classes = False
    return to_finetune


def _each(value: Any, name: str, count: int) -> list[Any]:
    """An argument for each teacher: a list of as many, or options that all of them get."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(
                f"{name} is a list of {len(value)} for {count} teachers: one for each, None for "
                "none"
            )
        return list(value)
    if name == "teacher_weights" and value is not None and count != 1:
        raise ValueError(
            f"{name} is given once for {count} teachers: pass a list, one for each, None for none"
        )
    return [value] * count


def _load_teacher(
    source: Any,
    options: Mapping[str, Any] | None,
    weights: Any,
    head: str | None,
    info: DataInfo,
    notes: list[str],
    *,
    dry_run: bool,
) -> nn.Module:
    options = check_options(source, options, "teacher")
    by_name = is_timm_name(source)
    # what a download brings for a name without a tag is not known in a dry run: take the data's
    unknown_classes = dry_run and by_name and "." not in source
    if unknown_classes:
        options = {"num_classes": info.num_classes} | options
    options = with_channels(options, by_name, info)
    if dry_run or weights is not None:
        pretrained: bool | None = False
    else:
        pretrained = True if by_name else None
    net = load_model(source, role="teacher", pretrained=pretrained, **options)
    check_usable(net, source, "teacher")
    notes += _source_notes(source)
    if weights is not None:
        net = copy_network(net) if net is source else net
        is_trained = head is not None and head != "as-is"
        line = load_weights(
            net, weights, role="teacher", keep_head=True, head_is_trained=is_trained
        )
        notes.append(line)
    return net


def _source_notes(source: Any) -> list[str]:
    """What a path was taken for, where it is not the network's own folder."""
    if not isinstance(source, (str, os.PathLike)):
        return []
    path = Path(str(os.fspath(source)).removeprefix("local-dir:")).expanduser()
    student = student_of_run(path)
    return [f"teacher: {path} is a run's folder, its student is loaded"] if student != path else []


def _head_note(label: str, held: int | None, num_classes: int, head: str | None) -> str:
    if held == num_classes:
        return f"{label} keeps its head of {num_classes} classes, and is trained first ({head})"
    return (
        f"{label} gets a new head of {num_classes} classes in place of {held}, "
        f"which is trained first ({head})"
    )


def _check_features_only(
    label: str, held: int | None, num_classes: int, head: str | None, losses: Sequence[str]
) -> None:
    """ValueError for a teacher of other classes, unless only its features are used."""
    if head != "feature-only":
        choices = " | ".join(f'teacher_head="{h}"' for h in TEACHER_HEADS if h != head)
        as_is = "" if head == "as-is" else '; "as-is" insists that the classes are the same'
        raise ValueError(
            f"{label} has {held or 'no'} classes, the data {num_classes}: pass {choices} "
            '("feature-only" goes with losses on features, such as fitnet, at and sp; "finetune" '
            'and "linear-probe" '
            f"train a new head first{as_is})"
        )
    if "kd/branch" in losses:
        raise ValueError(
            "teacher_head='feature-only', but the branch of method 'sokd' learns from the "
            "teacher's logits: pass "
            "teacher_head='finetune' or 'linear-probe'"
        )
    if {"kd", "logits"} & set(losses):
        raise ValueError(
            f"teacher_head='feature-only', but the losses {', '.join(losses)} read the teacher's "
            "logits: "
            "leave kd out with losses={...}, or pass teacher_head='finetune'"
        )


def check_no_shared_parameters(teacher: nn.Module, student: nn.Module) -> None:
    """Check that no parameter of the student is frozen with a teacher.

    Raises:
        ValueError: If they have.
    """
    trained = {id(p) for p in student.parameters()}
    shared = [name for name, p in teacher.named_parameters() if id(p) in trained]
    if shared:
        raise ValueError(
            f"teacher and student share parameters ({len(shared)}, such as {shared[0]!r}), and a "
            "teacher is frozen: "
            "pass copy.deepcopy(...) of the network as one of them"
        )
