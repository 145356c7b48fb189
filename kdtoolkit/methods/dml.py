"""Deep mutual learning, DML (Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384).

Loss     sum over networks k of CE_k + mean over l != k of T^2 KL(p_l || p_k), p_l detached, T = 1. Every network gets
         the same images, or with `views` an augmentation of its own
Differs  all networks step on one forward pass; in the paper each sees the others after their updates. The authors'
         release is form="tf", that of OKDDip's benchmark form="eps", detach=False, temperature=3.0
"""

from __future__ import annotations

from typing import Any

from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.peers import build_peers


@register_strategy(
    "dml", losses={"ce": 1.0, "mutual": 1.0}, title="Deep mutual learning, DML (Zhang et al. 2018)"
)
def dml(
    given: StrategyInputs,
    *,
    peers: Any = 2,
    temperature: float = 1.0,
    target: str = "pairwise",
    detach: bool = True,
    form: str = "kl",
    views: bool = False,
    label_smoothing: float = 0.0,
    spread: bool | str = "auto",
) -> Method:
    """peers: networks, the student among them, or a list of further ones (names or modules); temperature, target,
    detach, form: see MutualKL; views, label_smoothing, spread: see Peers."""
    mutual = MutualKL(
        given.weights["mutual"], temperature=temperature, target=target, detach=detach, form=form
    )
    method = build_peers(given, peers, views=views, label_smoothing=label_smoothing, spread=spread)
    method.callbacks = (mutual,)
    return method
