"""A copy of a network, also of one that keeps computed weights as attributes."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copy_network(net: nn.Module) -> nn.Module:
    """Copy a network.

    `copy.deepcopy` refuses tensors that autograd computed, such as the `weight` that
    `torch.nn.utils.weight_norm` and `spectral_norm` keep beside their parameters; they are computed
    again in every forward, so their values are copied.

    Args:
        net: The network; it is not changed.

    Returns:
        The copy.
    """
    memo: dict[int, object] = {}
    for module in net.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(net, memo)
