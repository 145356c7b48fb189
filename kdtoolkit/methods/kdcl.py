"""Online knowledge distillation via collaborative learning, KDCL (Guo et al. 2020).

Loss: sum over networks i of CE_i + T^2 KL(p(z*; T) || p(z_i; T)), where the target z* is built of
all networks' logits, detached; T = 2; every network sees its own augmentation of the same images.

Differs: no code was published, T and the weight 1 are what later papers report; "general" mixes
logits.
"""

from __future__ import annotations

from kdtoolkit.callbacks.kdcl import KDCL
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.build_peers import PeerSelection, build_peers


@register_strategy(
    "kdcl", losses={"ce": 1.0, "kdcl": 1.0}, title="Collaborative learning, KDCL (Guo et al. 2020)"
)
def kdcl(
    inputs: StrategyInputs,
    *,
    peers: PeerSelection = 2,
    rule: str = "minlogit",
    temperature: float = 2.0,
    views: bool = True,
    label_smoothing: float = 0.0,
    spread: bool | str = "auto",
    redraw: str = "auto",
) -> Method:
    """Build collaborative learning of networks from one common target.

    Args:
        inputs: The student, weights, and what builds further networks.
        peers: Number of networks, from 2, the student among them; or a list of further ones, names
            or modules, of any architecture.
        rule: How the target is built: "minlogit", "naive", "linear", "mean", or "general", which
            needs a validation split.
        temperature: Of target and predictions, no unit, above 0.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        spread: Whether networks are spread over processes: True, False or "auto", where the number
            of processes divides that of the networks.
        redraw: "auto": peers are built as the student is, given weights included; "none", "head",
            "head+stem": copies of the student, with nothing, the classifier, or that and the first
            convolution re-initialised in every network.

    Returns:
        The method.
    """
    target = KDCL(inputs.weights["kdcl"], rule=rule, temperature=temperature)
    method = build_peers(
        inputs, peers, views=views, label_smoothing=label_smoothing, spread=spread,
        redraw=redraw,
    )  # fmt: skip
    method.callbacks = (target,)
    return method
