"""Deep communication learning, DCL (Zhang et al. 2022): networks exchange parts of their weights.

Loss     sum of the networks' cross-entropies on the same images; every 10 batches
         w_i <- 0.1 w_avg + 0.9 w_i, w_avg a mean in which small weights count more (see DCLMerger)
Differs  the rule "paper" as released; its eps shrinks small weights from K = 5 on, rule="eps-free" does not. The
         authors start most networks from ImageNet weights, here they differ in all their first weights
"""

from __future__ import annotations

from typing import Any

from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.peers import build_peers


@register_strategy(
    "dcl", losses={"ce": 1.0}, title="Deep communication learning, DCL (Zhang et al. 2022)"
)
def dcl(
    given: StrategyInputs,
    *,
    peers: Any = 2,
    every: int = 10,
    unit: str = "steps",
    beta: float = 0.1,
    rule: str = "paper",
    eps: float = 1e-18,
    statistics: str = "own",
    moments: str = "own",
    start: float = 0.0,
    until: float = 1.0,
    views: bool = False,
    label_smoothing: float = 0.0,
    spread: bool | str = "auto",
) -> Method:
    """peers: networks, the student among them, or a list of further ones of its architecture; every ... until: see
    DCLMerger, moments being its `momentum`; views, label_smoothing, spread: see Peers."""
    merger = DCLMerger(
        every, unit=unit, beta=beta, rule=rule, eps=eps, statistics=statistics, momentum=moments, start=start,
        until=until,
    )  # fmt: skip
    method = build_peers(given, peers, views=views, label_smoothing=label_smoothing, spread=spread)
    method.callbacks = (merger, Diversity())
    return method
