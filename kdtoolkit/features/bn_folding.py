"""BatchNorm folded into the convolution in front of it: a frozen network computes the same with one operation less.

In eval mode a BatchNorm is a fixed scale and shift per channel, which the convolution's weights can hold. The pairs are
found in a trace, not by name: a convolution whose output goes into one BatchNorm and nowhere else.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdtoolkit.features.tracing import Call, Trace, Value

Swap = tuple[nn.Module, str, nn.Module]  # parent, attribute, the module that was there


def fold_batch_norms(
    model: nn.Module, tr: Trace, *, keep: Collection[Value] = (), dtype: torch.dtype | None = None
) -> list[Swap]:
    """Swap every (convolution, BatchNorm) of `model` for one convolution; returns what `unfold` needs.

    keep   values that somebody reads
    dtype  of the folded weights: autocast's, where it would cast them at every call anyway
    The old modules are left untouched, only their places in `model` change.
    """
    users = _users(tr)
    modules = dict(model.named_modules())
    norms = {
        calls[0].inputs[0]: calls[0]
        for name, calls in tr.calls.items()
        if _foldable(modules[name], calls)
    }
    swaps: list[Swap] = []
    for name in list(tr.calls):
        conv = modules[name]
        call = tr.once(name)
        if (
            type(conv) is not nn.Conv2d
            or call is None
            or len(call.values) != 1
            or call.values[0] in keep
        ):
            continue
        norm_call = norms.get(call.values[0])
        if norm_call is None or users[call.values[0]] != 1:
            continue
        norm = modules[norm_call.name]
        assert isinstance(norm, nn.BatchNorm2d)
        folded = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
        swaps += [_swap(model, name, folded if dtype is None else folded.to(dtype))]
        after: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            after = nn.Sequential(OrderedDict(drop=norm.drop, act=norm.act))  # type: ignore[arg-type]
        swaps += [_swap(model, norm_call.name, after.eval())]
    return swaps


def unfold_batch_norms(swaps: list[Swap]) -> None:
    """Every module back in its place."""
    for parent, attribute, module in reversed(swaps):
        parent._modules[attribute] = module


def _users(tr: Trace) -> Counter[Value]:
    """How many operations read each value."""
    users: Counter[Value] = Counter()
    todo = [t.grad_fn for t in tr.logits]
    seen = set(todo)
    while todo:
        node = todo.pop()
        for parent, number in node.next_functions:  # type: ignore[union-attr]
            if parent is not None:
                users[parent, number] += 1
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
    return users


def _foldable(norm: nn.Module, calls: list[Call]) -> bool:
    ready = type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and norm.running_mean is not None
    return ready and len(calls) == 1 and calls[0].plain and len(calls[0].inputs) == 1


def _swap(model: nn.Module, name: str, module: nn.Module) -> Swap:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent._modules[attribute]
    assert old is not None
    parent._modules[attribute] = module
    return parent, attribute, old
