"""Deep communication learning, DCL (Zhang et al. 2022).

Loss: sum of the networks' cross-entropies, on the same images as in the authors' code, or with
batches="own" on a random batch for each network; every 10 batches the networks exchange parts of
their weights, w_i <- 0.1 w_avg + 0.9 w_i, where w_avg is a mean in which small weights count more
(see `DCLMerger`).

Differs: the rule "paper" is as released; its eps shrinks small weights from K = 5 networks on,
rule="eps-free" does not. The authors start most networks from ImageNet weights with another first
convolution and classifier in each, which is redraw="head+stem"; by default networks without given
weights differ in all of them.
"""

from __future__ import annotations

from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.build_peers import PeerSelection, build_peers


@register_strategy(
    "dcl", losses={"ce": 1.0}, title="Deep communication learning, DCL (Zhang et al. 2022)"
)
def dcl(
    inputs: StrategyInputs,
    *,
    peers: PeerSelection = 2,
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
    batches: str = "shared",
    redraw: str = "auto",
) -> Method:
    """Build deep communication learning between networks of one architecture.

    Args:
        inputs: The student, weights, and what builds further networks.
        peers: Number of networks, from 2, the student among them; or a list of further ones of its
            architecture, names or modules.
        every: Steps or epochs between two exchanges, a whole number from 1.
        unit: Unit of `every`, "steps" (batches) or "epochs".
        beta: Share of the common weights in an exchange, from 0 to 1.
        rule: How the common weights are formed, "paper", "eps-free" or "mean".
        eps: Epsilon of the rule "paper", no unit, from 0.
        statistics: BatchNorm statistics of each network: "own", "merged" at every exchange, or
            "recalibrated" at the end of every epoch.
        moments: What the optimizer keeps of a weight: "own", "merged" at every exchange, or "reset"
            at every exchange (`momentum` of `DCLMerger`).
        start: Share of the run before the first exchange, from 0 to `until`.
        until: Share of the run after which there are no exchanges, from `start` to 1.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        spread: Whether networks are spread over processes: True, False or "auto", where the number
            of processes divides that of the networks.
        batches: "shared": all networks see the same images in a step; "own": every network draws
            images of its own, as many as the batch size.
        redraw: "auto": peers are built as the student is, given weights included; "none", "head",
            "head+stem": copies of the student, with nothing, the classifier, or that and the first
            convolution re-initialised in every network.

    Returns:
        The method.
    """
    merger = DCLMerger(
        every,
        unit=unit,
        beta=beta,
        rule=rule,
        eps=eps,
        statistics=statistics,
        momentum=moments,
        start=start,
        until=until,
    )
    method = build_peers(
        inputs, peers, views=views, label_smoothing=label_smoothing, spread=spread, batches=batches,
        redraw=redraw,
    )  # fmt: skip
    method.callbacks = (merger, Diversity())
    return method
