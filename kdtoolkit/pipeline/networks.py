"""The networks of a run: student and teachers, with weights and the right classes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.model_inputs import get_pretrained_cfg, input_shape
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.head import num_outputs, replace_head
from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline.config import TEACHER_HEADS, NetworksConfig
from kdtoolkit.pipeline.data_info import DataInfo

TRAINED_HEADS = (
    "finetune",
    "linear-probe",
)  # with these a teacher of other classes gets a new head


def as_list(source: Any) -> list[Any]:
    """One source or several as a list; None is an empty one.

    Args:
        source: One source, a list or tuple of them, or None.

    Returns:
        A new list.
    """
    if source is None:
        return []
    return list(source) if isinstance(source, (list, tuple)) else [source]


def untapped(net: nn.Module, image_size: tuple[int, int]) -> Taps:
    """Stages and shapes of a network for images of the data, without hooks.

    Args:
        net: The network.
        image_size: Height and width of the images, pixels; used where the preprocessing of the
            network gives no size.

    Returns:
        Taps of the network, none of them selected.
    """
    return Taps(net, None, Preprocess.from_model(net, image_size).size or image_size)


# ------------------------------------------------------------------------------------- student
def build_student(
    networks: NetworksConfig, info: DataInfo, seed: int, notes: list[str], *, dry_run: bool
) -> nn.Module:
    """The student of a run.

    Args:
        networks: Where it comes from.
        info: The data; the student gets its number of classes.
        seed: Of a new head.
        notes: What was done to the network is appended, for the plan.
        dry_run: Whether weights are left unread.

    Returns:
        The network, ready to be trained.
    """
    source, options, weights = networks.student, networks.student_args, networks.student_weights
    assert source is not None  # checks.resolve_method
    _check_no_options(source, options, "student")
    by_name = is_timm_name(source)
    pretrained = False if dry_run or weights is not None else None
    # other sources keep their own classes first: their weights need them
    num_classes = info.num_classes if by_name else None
    net = load_model(
        source,
        num_classes=num_classes,
        role="student",
        pretrained=pretrained,
        **dict(options or {}),
    )
    with_tag = by_name and "." in str(source)
    held = (
        get_pretrained_cfg(net).get("num_classes")
        if with_tag
        else getattr(net, "num_classes", None)
    )
    classes_known = not isinstance(source, nn.Module) and not (by_name and weights is not None)
    if classes_known and held not in (None, info.num_classes):
        notes.append(
            f"the student gets a new head of {info.num_classes} classes in place of {held}"
        )
        if not by_name:
            replace_head(untapped(net, info.image_size), info.num_classes, seed)
    if weights is not None:
        notes.append(load_weights(net, weights, role="student", load=not dry_run))
    return check_trainable(net, info)


@contextlib.contextmanager
def weights_restored_on_error(net: Any) -> Iterator[None]:
    """The caller's module keeps its weights if what follows raises; names and None have none.

    Args:
        net: The module; anything else is left alone.

    Yields:
        Nothing; the block runs. After an error in it, the state dict is loaded back, and
        `pretrained_cfg` is set back if there was one.
    """
    if not isinstance(net, nn.Module):
        yield
        return
    before, pretrained_cfg = copy.deepcopy(net.state_dict()), getattr(net, "pretrained_cfg", None)
    try:
        yield
    except BaseException:
        net.load_state_dict(before)
        if pretrained_cfg is not None:
            net.pretrained_cfg = pretrained_cfg  # type: ignore[assignment]
        raise


def check_trainable(net: nn.Module, info: DataInfo) -> nn.Module:
    """Check that a network can be trained on the data.

    Args:
        net: The network.
        info: The data.

    Returns:
        The network itself.

    Raises:
        ValueError: If all of it is frozen, it is not float32, or its input channels or classes are
            not those of the data.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError(
            "every parameter of the student is frozen (requires_grad=False): nothing can be trained"
        )
    floating = [p for p in net.parameters() if p.is_floating_point()]
    other_types = sorted({str(p.dtype) for p in floating if p.dtype != torch.float32})
    if other_types:
        raise ValueError(
            f"the student has weights of {', '.join(other_types)}; trained are those of "
            "torch.float32: pass "
            'student.float(), and mixed_precision="bf16" for speed'
        )
    check_input_channels(net, "student")
    held = num_outputs(untapped(net, info.image_size))
    if held != info.num_classes:
        raise ValueError(
            f"the student has {held} classes, the data {info.num_classes}: build it with "
            f"num_classes={info.num_classes}"
        )
    return net


def check_input_channels(net: nn.Module, role: str) -> None:
    """Check that a network takes images of three channels, which all data has.

    Args:
        net: The network.
        role: "student" or "teacher", for the message.

    Raises:
        ValueError: If it takes another number of channels.
    """
    channels = input_shape(net)[0]
    if channels != 3:
        raise ValueError(
            f"the {role} takes images of {channels} channels, those of the data have 3 (grey ones "
            "are repeated): build "
            f"it with {role}_args={{'in_chans': 3}}"
        )


def _check_no_options(source: Any, options: Any, role: str) -> None:
    if options and isinstance(source, nn.Module):
        raise ValueError(
            f"{role}_args={dict(options)} has no effect on a network that is already built: pass "
            "its name"
        )


# ------------------------------------------------------------------------------------ teachers
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
        net = _load_teacher(source, options[number], weights[number], info, notes, dry_run=dry_run)
        check_no_shared_parameters(net, student)
        check_input_channels(net, "teacher")
        held = num_outputs(untapped(net, info.image_size))
        if head in TRAINED_HEADS and not finetuned:
            net = copy.deepcopy(net) if net is source else net
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
    info: DataInfo,
    notes: list[str],
    *,
    dry_run: bool,
) -> nn.Module:
    _check_no_options(source, options, "teacher")
    by_name = is_timm_name(source)
    # what a download brings for a name without a tag is not known in a dry run: take the data's
    unknown_classes = dry_run and by_name and "." not in source
    classes = {"num_classes": info.num_classes} if unknown_classes else {}
    if dry_run or weights is not None:
        pretrained: bool | None = False
    else:
        pretrained = True if by_name else None
    net = load_model(
        source, role="teacher", pretrained=pretrained, **classes, **dict(options or {})
    )
    if weights is not None:
        net = copy.deepcopy(net) if net is source else net
        notes.append(load_weights(net, weights, role="teacher", keep_head=True))
    return net


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
