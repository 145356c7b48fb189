"""Skip the computation in front of a stage whose output is replaced anyway.

The whole model is called, but the modules that return before the stage ends return empty tensors of
the right shape, and the hook at the stage's end replaces what they made. So it works for any model
that can be reset there, whatever its code does between its modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.blocks import parents_of
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall
from kdtoolkit.features.stage_boundary import StageBoundary

Forward = Callable[..., Tensor]


class ModuleStubs:
    """Stand-ins for the modules of a model that return before a stage ends.

    Example:
        ```python
        with ModuleStubs(model, trace, boundary).installed(batch_size):
            model(images)  # computes nothing in front of the boundary
        ```

    Args:
        model: The model.
        trace: Its trace.
        boundary: The end of the stage.
    """

    def __init__(self, model: nn.Module, trace: ModelTrace, boundary: StageBoundary) -> None:
        traced_batch = trace.x.shape[0]
        calls = _calls_to_skip(trace, boundary.returned_at)
        outermost = [name for name in calls if not _is_inside(name, calls)]
        self._stubs: list[tuple[nn.Module, Callable[[int], Forward]]] = []
        for name in outermost:
            module = model.get_submodule(name)
            if not isinstance(module, torch.jit.ScriptModule):
                self._stubs.append((module, _make_stub(calls[name], traced_batch)))

    @contextlib.contextmanager
    def installed(self, batch: int) -> Iterator[None]:
        """Put the stand-ins in place, for a forward of `batch` images.

        Args:
            batch: Number of images in the batch.

        Yields:
            Nothing; afterwards the modules have their own forwards again.
        """
        own_forwards = [(module, module.__dict__.get("forward")) for module, _ in self._stubs]
        for module, stub in self._stubs:
            module.forward = stub(batch)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, own in own_forwards:
                del module.forward
                if own is not None:
                    module.forward = own  # type: ignore[method-assign]


def _calls_to_skip(trace: ModelTrace, until: int) -> dict[str, ModuleCall]:
    """Calls that map image-dependent tensors to one such tensor and return by `until`."""
    found = {}
    for name in trace.calls:
        call = trace.single_call(name)
        if not name or call is None or call.returned_at > until:
            continue
        if not (call.returns_tensor and call.outputs and call.inputs):
            continue
        if call.outputs[0].shape[0] % trace.x.shape[0] == 0:
            found[name] = call
    return found


def _is_inside(name: str, others: Collection[str]) -> bool:
    return any(parent in others for parent in parents_of(name))


def _make_stub(call: ModuleCall, traced_batch: int) -> Callable[[int], Forward]:
    """From the number of images to a forward that returns an empty tensor."""
    first, *sizes = call.outputs[0].shape
    rows_per_image = first // traced_batch

    def stub(batch: int) -> Forward:
        def forward(*args: object, **kwargs: object) -> Tensor:
            x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            return torch.empty(batch * rows_per_image, *sizes, device=x.device, dtype=x.dtype)

        return forward

    return stub
