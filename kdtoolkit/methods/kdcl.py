"""Online knowledge distillation via collaborative learning, KDCL (Guo et al. 2020).

Loss     sum over networks i of CE_i + T^2 KL(p(z*; T) || p(z_i; T)), z* built of all networks' logits, detached, T = 2;
         every network sees an augmentation of its own of the same images
Differs  no code was published, T and the weight 1 are what later papers report; "general" mixes logits
"""

from __future__ import annotations

from typing import Any

from kdtoolkit.callbacks.kdcl import KDCL
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.peers import build_peers


@register_strategy(
    "kdcl", losses={"ce": 1.0, "kdcl": 1.0}, title="Collaborative learning, KDCL (Guo et al. 2020)"
)
def kdcl(
    given: StrategyInputs,
    *,
    peers: Any = 2,
    rule: str = "minlogit",
    temperature: float = 2.0,
    views: bool = True,
    label_smoothing: float = 0.0,
    spread: bool | str = "auto",
) -> Method:
    """peers: networks, the student among them, or a list of further ones (names or modules); rule, temperature: see
    the callback KDCL; views, label_smoothing, spread: see Peers."""
    target = KDCL(given.weights["kdcl"], rule=rule, temperature=temperature)
    method = build_peers(given, peers, views=views, label_smoothing=label_smoothing, spread=spread)
    method.callbacks = (target,)
    return method
