"""The student of a run, with weights and the right classes; checks of every network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.model_inputs import get_pretrained_cfg, input_shape
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.head import num_outputs, replace_head
from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline.config import NetworksConfig
from kdtoolkit.pipeline.data_info import DataInfo


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
    check_no_options(source, options, "student")
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


def check_no_options(source: Any, options: Any, role: str) -> None:
    """Check that constructor options are given for a network that is built by name only.

    Args:
        source: Where the network comes from.
        options: Options of its constructor.
        role: "student" or "teacher", for the message.

    Raises:
        ValueError: If the network is built already.
    """
    if options and isinstance(source, nn.Module):
        raise ValueError(
            f"{role}_args={dict(options)} has no effect on a network that is already built: pass "
            "its name"
        )
