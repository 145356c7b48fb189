"""The order of a teacher's classes beside that of the data, where both have names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.copying import copy_network
from kdtoolkit.models.head import classifier_names

MAX_NAMES = 4  # that a message lists
IGNORED_BY = ("finetune", "linear-probe", "feature-only", "as-is")  # choices of teacher_head


def label_names(net: nn.Module) -> list[str] | None:
    """Find the names of a network's classes, in the order of its logits.

    Args:
        net: The network; timm's configuration of it holds `label_names`.

    Returns:
        The names, or None.
    """
    names = get_pretrained_cfg(net).get("label_names")
    if isinstance(names, (list, tuple)) and names:
        return [str(name) for name in names]
    return None


def match_class_order(
    taps: Taps,
    class_names: Sequence[str] | None,
    *,
    label: str,
    head: str | None,
    is_callers: bool,
    notes: list[str],
    can_change: bool = True,
) -> nn.Module:
    """Give a teacher the data's order of classes.

    Args:
        taps: The teacher, without hooks.
        class_names: Names of the data's classes in the order of the class ids, or None.
        label: What to call the teacher.
        head: Its choice of `teacher_head`.
        is_callers: Whether the network is the caller's own, so that a copy is changed.
        notes: What was done or could not be compared is appended, for the plan.
        can_change: Whether its classifier may be put into another order; else that is an error.

    Returns:
        The teacher itself; where its classes are the same in another order, a network whose
        classifier is put into the data's order.

    Raises:
        ValueError: If some of its classes have other places, so that its logits would be read as
            those of other classes.
    """
    net, theirs = taps.model, label_names(taps.model)
    if theirs is None or class_names is None or len(theirs) != len(class_names):
        return net
    ours = list(map(_plain, class_names))
    held = list(map(_plain, theirs))
    if ours == held:
        return net
    if can_change and set(ours) == set(held) and len(set(held)) == len(held):
        order = [held.index(name) for name in ours]
        net = _reordered(taps, order, label, copied=is_callers)
        notes.append(
            f"{label} has the data's classes in another order ({_list(theirs)}): its logits are "
            f"put into the data's order ({_list(class_names)})"
        )
        return net
    moved = [k for k, name in enumerate(ours) if name in held and held[k] != name]
    if moved and head not in IGNORED_BY:
        k = moved[0]
        raise ValueError(
            f"class {k} of the data is {class_names[k]!r}, of {label} it is {theirs[k]!r} by its "
            f"label_names; {class_names[k]!r} is its class {held.index(ours[k])}: its logits would "
            "be read as those of other classes. Name and number the data's classes as the "
            "teacher does, pass teacher_head='finetune' to train its head on the data, or 'as-is' "
            "if its label_names are wrong"
        )
    notes.append(
        f"the label_names of {label} ({_list(theirs)}) are not the data's classes "
        f"({_list(class_names)}): their order could not be compared"
    )
    return net


def _plain(name: object) -> str:
    """A name as it is compared: "Great_white-shark" is "great white shark"."""
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:MAX_NAMES]))
    return shown + (", ..." if len(names) > MAX_NAMES else "")


def _reordered(taps: Taps, order: Sequence[int], label: str, copied: bool) -> nn.Module:
    """The network with logit `order[k]` as its logit k."""
    names = classifier_names(taps)
    net: nn.Module = copy_network(taps.model) if copied else taps.model
    heads: list[Any] = [net.get_submodule(name) for name in names]
    if not heads or not all(_is_plain_head(head, len(order)) for head in heads):
        raise ValueError(
            f"{label} has the data's classes in another order, and its classifier "
            f"({', '.join(type(head).__name__ for head in heads) or 'none was found'}) cannot be "
            "put into the data's order: number the data's classes in the order of its label_names"
        )
    with torch.no_grad():
        for head in heads:
            head.weight.copy_(head.weight[list(order)].clone())
            if head.bias is not None:
                head.bias.copy_(head.bias[list(order)].clone())
    _rename(net, order)
    return net


def _is_plain_head(head: nn.Module, classes: int) -> bool:
    if not isinstance(head, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return False
    own = set(dict(head.named_parameters(recurse=False)))
    return own <= {"weight", "bias"} and "weight" in own and len(head.weight) == classes


def _rename(net: nn.Module, order: Sequence[int]) -> None:
    """Put the label_names of a changed network into their new order."""
    names = label_names(net)
    assert names is not None
    changed = get_pretrained_cfg(net) | {"label_names": [names[at] for at in order]}
    net.pretrained_cfg = changed  # type: ignore[assignment]
    if hasattr(net, "default_cfg"):  # timm's older name of the same
        net.default_cfg = changed  # type: ignore[assignment]
