"""The proof that a stage reset is what it says: each stage computed from what was put in front of it and nothing else.

It is read off the autograd graph of one forward, on the meta device where the model can run there: a leaf stands for
the image and one for every tensor of every boundary. What autograd does not see (argmax, detach, Python that looks at
values) is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.hooks import Store, hook
from kdtoolkit.features.tracing import quiet, sources
from kdtoolkit.types import TapKey

if TYPE_CHECKING:
    from kdtoolkit.features.extractor import Taps

IMAGE, LOGITS = "the image", "the logits"


def find_reset_leaks(taps: Taps, keys: Sequence[TapKey]) -> list[str]:
    """What is wrong with a reset at all the taps `keys` at once, a sentence each; [] if it is exact: every stage after
    a reset one, and the logits, depend on all tensors of the boundary in front of them, and on nothing else."""
    tr, store = taps.trace, Store()
    ends = {taps.key(key): taps.end(key) for key in sorted(keys, key=lambda k: taps.end(k).left)}
    for key in ends:
        taps.check_cut(key)
    given = {key: [_leaf(tr.x, part.shape) for part in end.boundary] for key, end in ends.items()}
    image = torch.empty_like(tr.x).requires_grad_()
    names = {id(image): IMAGE}
    replace = {}
    for key, end in ends.items():
        names |= {id(t): part.name for t, part in zip(given[key], end.boundary, strict=True)}
        replace[key] = dict(
            zip((i for i, p in enumerate(end.parts) if p.read), given[key], strict=True)
        )
    handles = [handle for key, end in ends.items() for handle in hook(tr.model, key, end, store)]
    try:
        with quiet(tr.model), torch.enable_grad():
            store.begin(
                {key: {i: t.clone() for i, t in parts.items()} for key, parts in replace.items()}
            )
            logits = tree_leaves(tr.model(image.clone()))
    finally:
        for handle in handles:
            handle.remove()
    outputs = {
        key: [store.feats[key, i] for i in range(len(end.parts))] for key, end in ends.items()
    }
    return list(_faults({**outputs, LOGITS: logits}, given, names))


def _leaf(x: Tensor, shape: Sequence[int]) -> Tensor:
    windows = getattr(shape, "windows", (1, 1))
    batch = x.shape[0] * windows[0] * windows[1]
    return torch.empty(batch, *shape, device=x.device, dtype=x.dtype, requires_grad=True)


def _faults(
    outputs: dict[TapKey, list[Tensor]], given: dict[TapKey, list[Tensor]], names: dict[int, str]
) -> Iterable[str]:
    before = {IMAGE}
    for key, tensors in outputs.items():
        found = {
            names[id(s)]
            for t in tensors
            if isinstance(t, Tensor)
            for s in sources(t)
            if id(s) in names
        }
        where = LOGITS if key == LOGITS else f"the output of {key!r}"
        if found - before:
            yield f"{where} still depend{'s' * (key != LOGITS)} on {', '.join(sorted(found - before))}"
        if before - found:
            yield f"{where} do{'es' * (key != LOGITS)} not depend on {', '.join(sorted(before - found))}"
        before = {names[id(t)] for t in given.get(key, [])}
