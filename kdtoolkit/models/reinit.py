"""Other initial weights for a network of the same architecture, or for some of its modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtoolkit.models.copying import copy_network


def reinitialised_copy(net: nn.Module, seed: int) -> nn.Module:
    """Copy a network and re-initialise the copy.

    Every module's `reset_parameters` is called, then the model's own `init_weights`. A parameter
    that neither changes (class token, scale) keeps its values if they are constant, and is
    otherwise drawn from a normal distribution with the mean and standard deviation that it has.
    Frozen parameters, and buffers of modules whose parameters are all frozen, stay as they are, as
    do buffers that no module resets.

    Args:
        net: Any network; it is not changed.
        seed: The random numbers depend on this alone, and the global generator does not move.

    Returns:
        The copy.

    Example:
        ```python
        peers = [net, reinitialised_copy(net, seed=1), reinitialised_copy(net, seed=2)]
        ```
    """
    new = copy_network(net)
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in new.modules():
            _call_initialiser(module, "reset_parameters")
        _call_initialiser(new, "init_weights")
        for name, parameter in new.named_parameters():
            if parameter.requires_grad:
                _redraw_if_unchanged(parameter, before[name])
            else:
                parameter.copy_(before[name])
        _restore_buffers_of_frozen_modules(new, net)
    return new


def reinitialise_modules(net: nn.Module, names: Sequence[str], seed: int) -> None:
    """Re-initialise some modules of a network, in place, as `reinitialised_copy` does all.

    Args:
        net: The network.
        names: Names of the modules.
        seed: The random numbers depend on this alone, and the global generator does not move.
    """
    fresh = reinitialised_copy(net, seed)
    with torch.no_grad():
        for name in names:
            new = dict(fresh.get_submodule(name).named_parameters())
            for key, parameter in net.get_submodule(name).named_parameters():
                parameter.copy_(new[key])


def _redraw_if_unchanged(parameter: nn.Parameter, before: Tensor) -> None:
    if parameter.is_meta or not parameter.is_floating_point() or parameter.numel() < 2:
        return
    if torch.equal(parameter, before) and parameter.std() > 0:
        noise = torch.randn(parameter.shape).to(parameter)
        parameter.copy_(noise * parameter.std() + parameter.mean())


def _restore_buffers_of_frozen_modules(new: nn.Module, net: nn.Module) -> None:
    for module, original in zip(new.modules(), net.modules(), strict=True):
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(p.requires_grad for p in parameters):
            for name, buffer in module.named_buffers(recurse=False):
                buffer.copy_(original.get_buffer(name))


def _call_initialiser(module: nn.Module, name: str) -> None:
    method: object = getattr(module, name, None)
    if callable(method):
        try:
            method()
        except TypeError:  # it takes arguments, so it is not an initialisation of its own
            return
