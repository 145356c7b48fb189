"""The student of a run, with weights and the right classes; checks of every network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.model_inputs import get_pretrained_cfg, input_shape
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.head import num_outputs, replace_head
from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.module_checks import check_module
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline.config import NetworksConfig
from kdtoolkit.pipeline.data_info import DataInfo

GREY_AND_COLOUR = {1, 3}  # either is made of the other
# options of timm.create_model that a run gives itself: name -> what to do instead
SET_BY_THE_RUN = {
    "pretrained": "name the weights' tag ('resnet18.a1_in1k'), or pass {}_weights",
    "checkpoint_path": "pass the file as {}_weights",
    "role": "leave it out",
    "spec": "pass the network as {}",
}


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
    options = check_options(source, options, "student", info.num_classes)
    by_name = is_timm_name(source)
    pretrained = False if dry_run or weights is not None else None
    # other sources keep their own classes first: their weights need them
    num_classes = info.num_classes if by_name else None
    options = with_channels(options, by_name, info)
    net = load_model(
        source,
        num_classes=num_classes,
        role="student",
        pretrained=pretrained,
        **options,
    )
    check_usable(net, source, "student")
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
    check_input_channels(net, "student", info.channels)
    held = num_outputs(untapped(net, info.image_size))
    if held != info.num_classes:
        raise ValueError(
            f"the student has {held} classes, the data {info.num_classes}: build it with "
            f"num_classes={info.num_classes}"
        )
    return net


def check_input_channels(net: nn.Module, role: str, channels: int = 3) -> None:
    """Check that a network takes images of the data's channels, or grey for colour or vice versa.

    Args:
        net: The network.
        role: "student" or "teacher", for the message.
        channels: Channels of the data.

    Raises:
        ValueError: If it takes another number of channels.
    """
    found = input_shape(net)[0]
    if found == channels or {found, channels} <= GREY_AND_COLOUR:
        return
    of_data = f", or pass channels={found} for data of {found} channels" if found == 4 else ""
    raise ValueError(
        f"the {role} takes images of {found} channels, those of the data have {channels}: build "
        f"it with {role}_args={{'in_chans': {channels}}}{of_data}"
    )


def check_usable(net: nn.Module, source: Any, role: str) -> None:
    """Check a module of the caller as far as that needs no forward.

    Args:
        net: The network.
        source: What the caller gave for it; a network that was built by name is not checked.
        role: "student" or "teacher", for the message.

    Raises:
        ValueError: As `check_module`.
    """
    if source is net:
        check_module(net, role)


def with_channels(options: dict[str, Any], by_name: bool, info: DataInfo) -> dict[str, Any]:
    """The options of a network, with the channels of the data where these are not three.

    Args:
        options: Options of its constructor.
        by_name: Whether timm builds the network; others have the channels that they have.
        info: The data.

    Returns:
        The options, with `in_chans` unless that is given.
    """
    return options if not by_name or info.channels == 3 else {"in_chans": info.channels} | options


def check_options(
    source: Any, options: Any, role: str, num_classes: int | None = None
) -> dict[str, Any]:
    """Check the constructor options of a network that is built by name.

    Args:
        source: Where the network comes from.
        options: Options of its constructor.
        role: "student" or "teacher", for the message.
        num_classes: Number of classes that the network gets, so that options must not say another;
            None where they may.

    Returns:
        The options to pass on.

    Raises:
        ValueError: If the network is built already, or an option is one that the run sets itself.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(
            f"{role}_args={options!r}: pass options of the constructor by name, such as "
            "{'img_size': 32}"
        )
    if options and isinstance(source, nn.Module):
        raise ValueError(
            f"{role}_args={dict(options)} has no effect on a network that is already built: pass "
            "its name"
        )
    found = dict(options)
    for name, instead in SET_BY_THE_RUN.items():
        if name in found:
            raise ValueError(f"{role}_args: {name!r} is set by the run; {instead.format(role)}")
    if num_classes is None or "num_classes" not in found:
        return found
    given = found.pop("num_classes")
    if given != num_classes:
        raise ValueError(
            f"{role}_args={{'num_classes': {given!r}}}: the {role} gets as many classes as the "
            f"data, {num_classes}: leave it out"
        )
    return found
