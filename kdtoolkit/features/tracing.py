"""Trace one forward pass: which module is called when, on what, and what it returns.

The forward runs on a copy whose parameters are on the meta device (no memory, no arithmetic), with
only the image requiring grad. Nothing here knows a family of networks by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
)

from kdtoolkit.features.autograd_graph import GraphValue, graph_value, graph_values
from kdtoolkit.features.model_output import take_logits
from kdtoolkit.features.model_trace import ModelTrace, ModuleCall, TracedOutput


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure onto the meta device: no memory, no weights; in eval mode.

    Args:
        model: The model; it is not changed.

    Returns:
        The copy; none of its parameters requires grad.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


@contextlib.contextmanager
def eval_without_gradients(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in eval mode without trainable parameters, and afterwards back as it was.

    Args:
        model: The model; it is changed in place.

    Yields:
        The same model; afterwards every module has its mode and every parameter its `requires_grad`
        again.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def trace_model(model: nn.Module, size: tuple[int, int, int], batch: int = 2) -> ModelTrace:
    """Trace one forward pass, on the meta device where the model can run there.

    Args:
        model: Any model that maps images to logits; it is not changed.
        size: Image size (channels, H, W).
        batch: Number of images.

    Returns:
        The calls of all modules, and the autograd graph.

    Raises:
        ValueError: If the model cannot run on images of this size.
    """
    with torch.inference_mode(False):
        try:
            structure = meta_copy(model)
            x = torch.empty(batch, *size, device="meta", dtype=_float_dtype(structure))
            return _record_forward(structure, x)
        except Exception as error:
            # no deep copy, tensors that are neither parameters nor buffers, data-dependent code
            return _trace_on_own_device(model, size, batch, error)


def _trace_on_own_device(
    model: nn.Module, size: tuple[int, int, int], batch: int, meta_error: Exception
) -> ModelTrace:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise _cannot_run(model, size, meta_error) from meta_error
    try:
        with eval_without_gradients(model), torch.device(device):
            x = torch.full((batch, *size), 0.5, device=device, dtype=_float_dtype(model))
            return _record_forward(model, x)
    except Exception as error:
        raise _cannot_run(model, size, error) from error


def _cannot_run(model: nn.Module, size: tuple[int, ...], error: Exception) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot run on images of size {tuple(size)}: {error}. "
        "Pass images of the size it was built for, or build it for this size "
        "(img_size=..., in_chans=...)"
    )


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class _Recorder:
    """Notes every call and return of a module."""

    def __init__(self) -> None:
        self.calls: dict[str, list[ModuleCall]] = defaultdict(list)
        self._open: list[tuple[int, list[GraphValue], bool]] = []  # calls that have not returned
        self._returned: list[tuple[ModuleCall, Tensor, int]] = []  # with the tensor's version then
        self._position = 0

    def enter(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        self._position += 1
        takes_one_tensor = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        inputs = graph_values(_tensors((args, kwargs)))
        self._open.append((self._position, inputs, takes_one_tensor))

    def leave(self, name: str, output: object) -> None:
        self._position += 1
        called_at, inputs, takes_one_tensor = self._open.pop()
        call = ModuleCall(
            name, called_at, self._position, inputs, takes_one_tensor, isinstance(output, Tensor)
        )
        for index, (path, tensor) in enumerate(tree_flatten_with_path(output)[0]):
            value = graph_value(tensor) if isinstance(tensor, Tensor) else None
            if value is not None:
                shape = tuple(tensor.shape)
                call.outputs.append(TracedOutput(shape, value, index, _format_path(path)))
                self._returned.append((call, tensor, tensor._version))
        self.calls[name].append(call)

    def finish(self) -> dict[str, list[ModuleCall]]:
        for call, tensor, version in self._returned:
            call.overwritten |= tensor._version != version
        return dict(self.calls)


def _record_forward(model: nn.Module, x: Tensor) -> ModelTrace:
    recorder = _Recorder()

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        recorder.enter(args, kwargs)

    def leave(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        return lambda module, args, output: recorder.leave(name, output)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        leaf = x.requires_grad_(True)
        # a compiled model runs eagerly too; the graph keeps its structure and no activations
        with (
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(_drop, _drop),
        ):
            logits = take_logits(model(leaf.clone()))
    finally:
        for handle in handles:
            handle.remove()
    return ModelTrace(model, leaf, _tensors(logits), recorder.finish(), isinstance(logits, Tensor))


def _drop(_: Tensor) -> Any:
    """In place of saving an activation, or of reading it: nothing is kept."""
    return None


def _tensors(tree: object) -> list[Tensor]:
    """Tensors of a pytree that depend on the image."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn is not None]


def _format_path(path: Sequence[object]) -> str:
    """The place of a tensor in a pytree, as it is written behind a module's name: "[0][out]"."""
    attributes: dict[type, str] = {SequenceKey: "idx", MappingKey: "key", GetAttrKey: "name"}
    return "".join(f"[{getattr(step, attributes[type(step)])}]" for step in path)
