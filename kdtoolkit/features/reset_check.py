"""Check that a stage reset is exact: a stage is computed from its replaced input alone.

It is read off the autograd graph of one forward, on the meta device where the model can run there:
one leaf stands for the image, and one for every tensor of every boundary. What autograd does not
see (argmax, detach, Python that looks at values) is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.autograd_graph import source_leaves
from kdtoolkit.features.hooks import FeatureStore, register_hooks
from kdtoolkit.features.model_output import take_logits
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.features.tracing import eval_without_gradients
from kdtoolkit.types import Shape, TapKey

IMAGE, LOGITS = "the image", "the logits"


def find_reset_errors(trace: ModelTrace, boundaries: Mapping[TapKey, StageBoundary]) -> list[str]:
    """Find what is wrong with a reset at several taps at once.

    Args:
        trace: Trace of the model.
        boundaries: The taps and their boundaries, shallow to deep; each is replaceable.

    Returns:
        One sentence each; [] if the reset is exact: every stage behind a reset one, and the logits,
        depend on all tensors of the boundary in front of them, and on nothing else.
    """
    image = torch.empty_like(trace.x).requires_grad_()
    leaves = {
        key: [_make_leaf(trace.x, tensor.shape) for tensor in boundary.read_tensors]
        for key, boundary in boundaries.items()
    }
    names = {id(image): IMAGE}
    for key, boundary in boundaries.items():
        for leaf, tensor in zip(leaves[key], boundary.read_tensors, strict=True):
            names[id(leaf)] = tensor.name

    store = FeatureStore()
    outputs = _run_on_leaves(trace, boundaries, store, image, leaves)
    made = {
        key: [store.feats[key, index] for index in range(len(boundary.tensors))]
        for key, boundary in boundaries.items()
    }
    allowed = {IMAGE}
    errors: list[str] = []
    for key, tensors in made.items():
        sources = _named_sources(tensors, names)
        errors += _compare(f"the output of {key!r}", "s", "es", sources, allowed)
        allowed = {names[id(leaf)] for leaf in leaves[key]}
    return [*errors, *_compare(LOGITS, "", "", _named_sources(outputs, names), allowed)]


def _run_on_leaves(
    trace: ModelTrace,
    boundaries: Mapping[TapKey, StageBoundary],
    store: FeatureStore,
    image: Tensor,
    leaves: Mapping[TapKey, Sequence[Tensor]],
) -> list[object]:
    """What the model returns for the image with every boundary replaced by its leaves."""
    handles = [
        handle
        for key, boundary in boundaries.items()
        for handle in register_hooks(trace.model, key, boundary, store)
    ]
    try:
        with eval_without_gradients(trace.model), torch.enable_grad():
            replace = {}
            for key, boundary in boundaries.items():
                copies = [leaf.clone() for leaf in leaves[key]]
                replace[key] = dict(zip(boundary.read_indices, copies, strict=True))
            store.begin(replace)
            return tree_leaves(take_logits(trace.model(image.clone())))
    finally:
        for handle in handles:
            handle.remove()


def _make_leaf(x: Tensor, shape: Shape) -> Tensor:
    batch = x.shape[0] * shape.windows[0] * shape.windows[1]
    return torch.empty(batch, *shape, device=x.device, dtype=x.dtype, requires_grad=True)


def _named_sources(tensors: Sequence[object], names: Mapping[int, str]) -> set[str]:
    """Names of the leaves that some tensors were computed from."""
    leaves = [leaf for t in tensors if isinstance(t, Tensor) for leaf in source_leaves(t)]
    return {names[id(leaf)] for leaf in leaves if id(leaf) in names}


def _compare(
    where: str, verb_end: str, do_end: str, sources: set[str], allowed: set[str]
) -> Iterator[str]:
    if sources - allowed:
        yield f"{where} still depend{verb_end} on {', '.join(sorted(sources - allowed))}"
    if allowed - sources:
        yield f"{where} do{do_end} not depend on {', '.join(sorted(allowed - sources))}"
