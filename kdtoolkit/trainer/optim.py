"""The optimizer of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn

from kdtoolkit.core.config import PAPER_OPTIMIZERS, TrainerConfig
from kdtoolkit.core.method import Method
from kdtoolkit.models.layer_groups import layer_decay_groups
from kdtoolkit.utils.registry import suggestion


def check_optimizer(name: str) -> None:
    """Check that an optimizer exists.

    Args:
        name: `"sgd"`, `"nesterov"` or a name of timm, which may start with `"lookahead_"`.

    Raises:
        ValueError: If it does not; the message suggests similar names.
    """
    known = [*PAPER_OPTIMIZERS, *map(str, list_optimizers())]
    if name.lower().removeprefix("lookahead_") not in known:
        raise ValueError(
            f"optimizer={name!r} is unknown; allowed: 'sgd', 'nesterov' and the names of "
            f"timm.optim.list_optimizers(){suggestion(name, known)}"
        )


def make_optimizer(
    method: Method, config: TrainerConfig, layers: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Make one of timm's optimizers by name.

    `"sgd"` is plain momentum and `"nesterov"` Nesterov's, both with decay on every parameter as in
    the papers; every other name is timm's, without decay on biases and norms.

    Args:
        method: Owns the parameters.
        config: Name, learning rate, decay and momentum.
        layers: Parameter of the first network -> layer, as
            `kdtoolkit.models.layer_groups.layer_numbers` returns it; needed for
            `config.layer_decay`.

    Raises:
        ValueError: If the optimizer is unknown or refuses its numbers, or `layers` is missing.
    """
    check_optimizer(config.optimizer)
    decays_all = config.optimizer in PAPER_OPTIMIZERS
    parameters = _parameters(method, config, layers)
    try:
        return create_optimizer_v2(
            parameters,
            opt=PAPER_OPTIMIZERS.get(config.optimizer, config.optimizer),
            filter_bias_and_bn=not decays_all,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"optimizer={config.optimizer!r}, lr={config.lr}, "
            f"weight_decay={config.weight_decay}: {error}"
        ) from error


def _parameters(
    method: Method, config: TrainerConfig, layers: Mapping[str, int] | None
) -> nn.Module | list[dict[str, Any]]:
    """The method, or parameter groups with a learning rate for each layer."""
    if config.layer_decay is None:
        return method
    if layers is None:
        raise ValueError(
            f"layer_decay={config.layer_decay} needs the layers of the network: pass "
            "layers=kdtoolkit.models.layer_groups.layer_numbers(taps)"
        )
    return layer_decay_groups(
        method,
        next(iter(method.networks().values())),
        layers,
        filtered=config.optimizer not in PAPER_OPTIMIZERS,
        lr=config.lr,
        weight_decay=config.weight_decay,
        decay=config.layer_decay,
    )
