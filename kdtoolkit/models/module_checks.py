"""Modules that cannot be trained or teach as they are, found before anything else is done."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy


def check_module(net: nn.Module, role: str) -> nn.Module:
    """Check that a module has weights, and code that can be run in training.

    Args:
        net: The module.
        role: How messages call it, such as "teacher".

    Returns:
        The module itself.

    Raises:
        ValueError: If parameters have no shape or no data, were made in inference mode, or the
            module is an exported program.
    """
    named = dict(net.named_parameters())
    lazy = [name for name, p in named.items() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"the {role} is {type(net).__name__}, whose lazy modules have no shapes yet "
            f"({_first(lazy)}): run one forward first, with images of your data's size, such as "
            "net(torch.zeros(2, 3, 32, 32))"
        )
    empty = [name for name, p in named.items() if p.is_meta]
    if empty:
        raise ValueError(
            f"the {role} is {type(net).__name__} on the meta device ({_first(empty)}), where "
            "tensors have no values: build it on the CPU, outside of torch.device('meta')"
        )
    inference = [name for name, p in net.state_dict().items() if p.is_inference()]
    if inference:
        raise ValueError(
            f"the {role} is {type(net).__name__}, made in torch.inference_mode() "
            f"({_first(inference)}), which autograd cannot use: build it outside, or pass "
            "copy.deepcopy(net)"
        )
    _check_not_exported(net, role)
    return net


def _check_not_exported(net: nn.Module, role: str) -> None:
    # torch.export gives its modules an `eval` that raises
    if any(isinstance(module, GraphModule) and "eval" in vars(module) for module in net.modules()):
        raise exported_program_error(role)
    is_script = isinstance(net, torch.jit.ScriptModule)
    if is_script and role != "teacher":
        raise ValueError(
            f"the {role} is a TorchScript module, which cannot be copied, tapped and saved as a "
            "network: pass the nn.Module that it was made of. A TorchScript teacher is possible, "
            "for losses on logits"
        )


def check_readable_features(net: nn.Module) -> None:
    """Check that features of a module can be read while it runs.

    Args:
        net: The module.

    Raises:
        ValueError: If it is a TorchScript module, whose inner modules call no hooks.
    """
    if isinstance(net, torch.jit.ScriptModule):
        raise ValueError(
            f"{type(net).__name__} is a TorchScript module: its logits teach, its features cannot "
            "be read. Use method='kd' or another loss on logits, or pass the nn.Module that it was "
            "made of"
        )


def exported_program_error(role: str) -> ValueError:
    """The error for a network that torch.export made.

    Args:
        role: How messages call it, such as "teacher".

    Returns:
        The error.
    """
    return ValueError(
        f"the {role} comes from torch.export, which fixes the batch size and the mode of a "
        "network and leaves no modules to tap: pass the nn.Module that was exported"
    )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
