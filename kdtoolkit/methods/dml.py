"""Deep mutual learning, DML (Zhang, Xiang, Hospedales, Lu 2018, arXiv 1706.00384).

Loss: sum over networks k of CE_k plus the mean over l != k of T^2 KL(p_l || p_k), p_l detached, T =
1. Every network gets the same images, or with `views` its own augmentation of them.

Differs: all networks step on one forward pass; in the paper each sees the others after their
updates. The authors' release is form="tf", that of OKDDip's benchmark form="eps", detach=False,
temperature=3.0.
"""

from __future__ import annotations

from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.methods.build_peers import PeerSelection, build_peers


@register_strategy(
    "dml", losses={"ce": 1.0, "mutual": 1.0}, title="Deep mutual learning, DML (Zhang et al. 2018)"
)
def dml(
    inputs: StrategyInputs,
    *,
    peers: PeerSelection = 2,
    temperature: float = 1.0,
    target: str = "pairwise",
    detach: bool = True,
    form: str = "kl",
    views: bool = False,
    label_smoothing: float = 0.0,
    spread: bool | str = "auto",
    batches: str = "shared",
    redraw: str = "auto",
) -> Method:
    """Build deep mutual learning between networks.

    Args:
        inputs: The student, weights, and what builds further networks.
        peers: Number of networks, from 2, the student among them; or a list of further ones, names
            or modules, of any architecture.
        temperature: Of the networks' probabilities, no unit, above 0.
        target: "pairwise": each of the others in turn; "ensemble": the mean of their logits.
        detach: Whether the networks that teach get no gradient.
        form: "kl": the paper's; "eps": that of OKDDip's benchmark; "soft-ce": cross-entropy without
            T^2; "tf": the authors' TensorFlow release.
        views: Whether every network has its own augmentation of an image.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        spread: Whether networks are spread over processes: True, False or "auto", where the number
            of processes divides that of the networks.
        batches: "shared": all networks see the same images in a step; "own": every network draws
            its own, which the loss "mutual" does not allow: only with losses={"ce": 1.0}.
        redraw: "auto": peers are built as the student is, given weights included; "none", "head",
            "head+stem": copies of the student, with nothing, the classifier, or that and the first
            convolution re-initialised in every network.

    Returns:
        The method.
    """
    mutual = MutualKL(
        inputs.weights["mutual"], temperature=temperature, target=target, detach=detach, form=form
    )
    method = build_peers(
        inputs, peers, views=views, label_smoothing=label_smoothing, spread=spread, batches=batches,
        redraw=redraw,
    )  # fmt: skip
    method.callbacks = (mutual,)
    return method
