"""One traced forward pass: which module was called when, on what, and what it returned.

The forward runs on a copy whose parameters are on the meta device (no memory, no arithmetic), with
only the image requiring grad. Nothing here knows a family of networks by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
)

from kdtoolkit.features.autograd_graph import GraphValue, find_dominators, graph_value, graph_values


class StageEntry(TypedDict, total=False):
    """One row of timm's `feature_info`: a stage as the model describes it itself."""

    module: str  # name of the module that ends the stage
    num_chs: int  # channels of its feature
    reduction: float  # image height over the height of the feature


@dataclass(frozen=True)
class TracedOutput:
    """One tensor that a module returned.

    Attributes:
        shape: Its shape, with the batch.
        value: Its place in the autograd graph.
        leaf_index: Its place among the leaves of the module's output, a pytree.
        path: How that place is written behind the module's name: "" where the output is a tensor,
            "[1]" in a tuple, "[out]" in a dict.
    """

    shape: tuple[int, ...]
    value: GraphValue
    leaf_index: int
    path: str


@dataclass
class ModuleCall:
    """One call of one module during the traced forward.

    Attributes:
        name: Name of the module.
        called_at: Position of the call in the order of all calls and returns.
        returned_at: Position of the return in the same order.
        inputs: Tensors among its arguments that depend on the image.
        takes_one_tensor: Whether it was called with one positional tensor and nothing else.
        returns_tensor: Whether it returned a tensor, not a tuple, list or dict.
        outputs: Tensors of its output that depend on the image.
        overwritten: Whether something later wrote into one of the outputs in place.
    """

    name: str
    called_at: int
    returned_at: int
    inputs: list[GraphValue]
    takes_one_tensor: bool
    returns_tensor: bool
    outputs: list[TracedOutput] = field(default_factory=list)
    overwritten: bool = False

    @cached_property
    def output_values(self) -> list[GraphValue]:
        """The outputs' places in the autograd graph."""
        return [output.value for output in self.outputs]


@dataclass
class ModelTrace:
    """What one forward pass showed of a model.

    Attributes:
        model: The model that ran, mostly a copy on the meta device.
        x: The image, (B, channels, H, W); a leaf of the autograd graph.
        logits: Tensors of the model's output that depend on the image.
        calls: Name of a module -> its calls, in order.
        returns_tensor: Whether the model returned a tensor, not a tuple, list or dict.
    """

    model: nn.Module
    x: Tensor
    logits: list[Tensor]
    calls: dict[str, list[ModuleCall]]
    returns_tensor: bool

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the model by its name."""
        return dict(self.model.named_modules())

    @cached_property
    def stage_table(self) -> list[StageEntry]:
        """The stages as the model describes them itself."""
        return read_stage_table(self.model)

    @cached_property
    def dominators(self) -> set[GraphValue]:
        """Values on every path from the image to the logits."""
        return find_dominators(self.logits, self.x)

    def single_call(self, name: str) -> ModuleCall | None:
        """The call of a module that runs exactly once in a forward, else None."""
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


def read_stage_table(model: nn.Module) -> list[StageEntry]:
    """Read timm's `feature_info` of a model.

    Args:
        model: Any model; the first module in it that has a table is taken, as a model may be in a wrapper.

    Returns:
        Its rows, with names of modules as the outer model has them; empty for other libraries.
    """
    for prefix, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        rows = getattr(info, "info", info)
        if not isinstance(rows, (list, tuple)) or not rows:
            continue
        if all(isinstance(row, dict) for row in rows):
            start = f"{prefix}." if prefix else ""
            return [{**row, "module": start + (row.get("module") or "")} for row in rows]
    return []


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a model's structure onto the meta device: no memory, no weights; in eval mode."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


@contextlib.contextmanager
def eval_without_gradients(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in eval mode without trainable parameters, and afterwards back as it was."""
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
        "Pass images of the size it was built for, or build it for this size (img_size=..., in_chans=...)"
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
            logits = model(leaf.clone())
    finally:
        for handle in handles:
            handle.remove()
    return ModelTrace(model, leaf, _tensors(logits), recorder.finish(), isinstance(logits, Tensor))


def _drop(_: object) -> None:
    """In place of saving an activation, or of reading it."""


def _tensors(tree: object) -> list[Tensor]:
    """Tensors of a pytree that depend on the image."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn is not None]


def _format_path(path: Sequence[object]) -> str:
    """The place of a tensor in a pytree, as it is written behind a module's name: "[0][out]"."""
    attributes: dict[type, str] = {SequenceKey: "idx", MappingKey: "key", GetAttrKey: "name"}
    return "".join(f"[{getattr(step, attributes[type(step)])}]" for step in path)
