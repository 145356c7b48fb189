"""Fold BatchNorm into the convolution in front of it: the same function with one operation less.

In eval mode a BatchNorm is a fixed scale and shift per channel, which the convolution's weights can
hold. The pairs are found in a trace, not by name: a convolution whose output goes into one
BatchNorm and nowhere else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdtoolkit.features.autograd_graph import GraphValue, count_readers
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall


@dataclass(frozen=True)
class ModuleSwap:
    """A module that another stands in for.

    Attributes:
        parent: The module that it lies in.
        attribute: Its name there.
        original: The module itself.
    """

    parent: nn.Module
    attribute: str
    original: nn.Module


def fold_batch_norms(
    model: nn.Module,
    trace: ModelTrace,
    *,
    keep: Collection[GraphValue] = (),
    dtype: torch.dtype | None = None,
) -> list[ModuleSwap]:
    """Replace every pair of convolution and BatchNorm by one convolution.

    The old modules are left untouched, only their places in the model change.

    Args:
        model: The model, in eval mode.
        trace: Its trace.
        keep: Values that somebody reads; a convolution that makes one stays.
        dtype: Precision of the folded weights: autocast's, where it would cast them at every call
            anyway. None is their own.

    Returns:
        What `unfold_batch_norms` needs to undo it: two swaps for each pair.
    """
    readers = count_readers(trace.logits)
    modules = dict(model.named_modules())
    norm_names = {
        calls[0].inputs[0]: name
        for name, calls in trace.calls.items()
        if _is_foldable(modules[name], calls)
    }
    swaps: list[ModuleSwap] = []
    for name in list(trace.calls):
        conv, value = modules[name], _only_output(trace, name)
        if type(conv) is not nn.Conv2d or value is None or value in keep:
            continue
        if value not in norm_names or readers[value] != 1:
            continue
        norm = modules[norm_names[value]]
        assert isinstance(norm, nn.BatchNorm2d)
        folded = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
        swaps.append(_swap(model, name, folded if dtype is None else folded.to(dtype)))
        swaps.append(_swap(model, norm_names[value], _without_norm(norm).eval()))
    return swaps


def unfold_batch_norms(swaps: Sequence[ModuleSwap]) -> None:
    """Put every module back in its place.

    Args:
        swaps: What `fold_batch_norms` returned; it is undone from the last to the first.
    """
    for swap in reversed(swaps):
        swap.parent._modules[swap.attribute] = swap.original


def _only_output(trace: ModelTrace, name: str) -> GraphValue | None:
    """The output of a module that runs once and returns one tensor."""
    call = trace.single_call(name)
    return call.output_values[0] if call is not None and len(call.outputs) == 1 else None


def _is_foldable(norm: nn.Module, calls: Sequence[ModuleCall]) -> bool:
    if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.running_mean is None:
        return False
    return len(calls) == 1 and calls[0].takes_one_tensor and len(calls[0].inputs) == 1


def _without_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a norm layer when the convolution does the normalisation."""
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(OrderedDict([("drop", norm.drop), ("act", norm.act)]))
    return nn.Identity()


def _swap(model: nn.Module, name: str, module: nn.Module) -> ModuleSwap:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = parent._modules[attribute]
    assert original is not None
    parent._modules[attribute] = module
    return ModuleSwap(parent, attribute, original)
