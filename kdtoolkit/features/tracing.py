"""One traced forward: which module made which value, and which values every path goes through.

The forward runs on a copy whose parameters live on the meta device (no memory, no arithmetic), with only the image
requiring grad, so the autograd graph is the data-flow graph from image to logits. A value is a place in that graph:
(grad_fn, output number). Nothing here knows a family of networks by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
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

Value = tuple[Any, int]


@dataclass
class Call:
    """One call of one module during the traced forward."""

    name: str
    entered: int  # position in the order of all entries and exits
    left: int
    inputs: list[Value]  # image-dependent tensors among its arguments
    plain: bool  # called with one positional tensor and nothing else
    bare: bool  # returned a tensor, not a tuple, list or dict
    # the image-dependent tensors of its output: shape with the batch, value, place among the leaves of the output, and
    # how one writes that: "" of a bare tensor, "[1]" of a tuple, "[out]" of a dict
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    overwritten: bool = False  # something later wrote into one of them in place

    def add(self, shape: tuple[int, ...], value: Value, leaf: int, path: str) -> None:
        for kept, new in (
            (self.shapes, shape),
            (self.values, value),
            (self.leaves, leaf),
            (self.paths, path),
        ):
            kept.append(new)  # type: ignore[arg-type]


@dataclass
class Trace:
    model: nn.Module
    x: Tensor
    logits: list[Tensor]
    calls: dict[str, list[Call]]
    bare_logits: bool
    _dominators: set[Value] | None = field(default=None, repr=False)
    _table: list[dict[str, Any]] | None = field(default=None, repr=False)

    @property
    def table(self) -> list[dict[str, Any]]:
        """What the model says of its own stages."""
        if self._table is None:
            self._table = feature_info(self.model)
        return self._table

    def once(self, name: str) -> Call | None:
        """The call of a module that runs exactly once in a forward, else None."""
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None

    @property
    def dominators(self) -> set[Value]:
        """Values on every path from the image to the logits."""
        if self._dominators is None:
            self._dominators = _dominators(self.logits, self.x)
        return self._dominators


def feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """timm's table of stages, of the model or of the first module in it that has one (a model in a wrapper); empty for
    models of other libraries."""
    for prefix, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        info = getattr(info, "info", info)
        if (
            isinstance(info, (list, tuple))
            and info
            and all(isinstance(entry, dict) for entry in info)
        ):
            inside = prefix + "." if prefix else ""
            return [{**entry, "module": inside + (entry.get("module") or "")} for entry in info]
    return []


def value_of(t: Tensor) -> Value | None:
    return (t.grad_fn, t.output_nr) if t.grad_fn is not None else None


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn is not None]


def _written(path: Any) -> str:
    """Where a tensor stands in a tree, as one writes it behind a module's name: "[1]", "[out]", "[0][1]"."""
    names = {SequenceKey: "idx", MappingKey: "key", GetAttrKey: "name"}
    return "".join(f"[{getattr(step, names[type(step)])}]" for step in path)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the structure whose parameters and buffers are on the meta device: no memory, no weights, eval mode."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo).eval()


def trace_model(model: nn.Module, size: tuple[int, int, int], batch: int = 2) -> Trace:
    """Trace one forward of `model` on images of `size` (3, H, W); on the meta device where the model can run there.

    The model itself is not changed. ValueError when it cannot run on images of this size.
    """
    with torch.inference_mode(False):
        return _trace(model, size, batch)


def _trace(model: nn.Module, size: tuple[int, int, int], batch: int) -> Trace:
    try:
        shadow = meta_copy(model)
        return _run(shadow, torch.empty(batch, *size, device="meta", dtype=_dtype(shadow)))
    except (
        Exception
    ) as meta_error:  # no deep copy, tensors outside parameters and buffers, data-dependent code
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise _cannot_run(model, size, meta_error) from meta_error
        try:
            with quiet(model), torch.device(device):
                return _run(
                    model, torch.full((batch, *size), 0.5, device=device, dtype=_dtype(model))
                )
        except Exception as error:
            raise _cannot_run(model, size, error) from error


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without trainable parameters, and afterwards as it was."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode


def _cannot_run(model: nn.Module, size: tuple[int, ...], error: Exception) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot run on images of size {tuple(size)}: {error}. "
        "Pass images of the size it was built for, or build it for this size (img_size=..., in_chans=...)"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _forget(_: Any) -> Any:
    return None


def _run(model: nn.Module, x: Tensor) -> Trace:
    calls: dict[str, list[Call]] = defaultdict(list)
    stack: list[tuple[int, list[Value], bool]] = []
    outputs: list[tuple[Call, Tensor, int]] = []  # and their version when the module returned
    clock = 0

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal clock
        clock += 1
        plain = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        stack.append((clock, [v for t in _tensors((args, kwargs)) if (v := value_of(t))], plain))

    def leave(name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal clock
            clock += 1
            entered, inputs, plain = stack.pop()
            call = Call(name, entered, clock, inputs, plain, isinstance(output, Tensor))
            for number, (path, t) in enumerate(tree_flatten_with_path(output)[0]):
                value = value_of(t) if isinstance(t, Tensor) else None
                if value:
                    call.add(tuple(t.shape), value, number, _written(path))
                    outputs.append((call, t, t._version))
            calls[name].append(call)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        leaf = x.requires_grad_(True)
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():  # a compiled model too
            with torch.autograd.graph.saved_tensors_hooks(_forget, _forget):
                logits = model(leaf.clone())  # the graph keeps its structure and no activations
    finally:
        for handle in handles:
            handle.remove()
    for call, t, version in outputs:
        call.overwritten |= t._version != version
    return Trace(model, leaf, _tensors(logits), dict(calls), isinstance(logits, Tensor))


def reaches(outputs: Iterable[Tensor], leaf: Tensor, blocked: Collection[Value]) -> bool:
    """Whether a path leads from `leaf` to `outputs` that goes through none of the `blocked` values."""
    return any(getattr(node, "variable", None) is leaf for node in _nodes(outputs, blocked))


def touches(outputs: Iterable[Tensor], value: Value, blocked: Collection[Value]) -> bool:
    """Whether something between `outputs` and the `blocked` values reads `value`."""
    outputs = list(outputs)
    read = any((p, n) == value for node in _nodes(outputs, blocked) for p, n in node.next_functions)
    return read or value in map(value_of, outputs)


def sources(t: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from."""
    found = {
        id(v): v for node in _nodes([t], ()) if (v := getattr(node, "variable", None)) is not None
    }
    return [t] if t.grad_fn is None and t.requires_grad else list(found.values())


def _nodes(outputs: Iterable[Tensor], blocked: Collection[Value]) -> Iterator[Any]:
    """Every operation that `outputs` were computed by, back to the `blocked` values."""
    todo = [v[0] for t in outputs if (v := value_of(t)) and v not in blocked]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for parent, number in node.next_functions:
            if parent is not None and (parent, number) not in blocked and parent not in seen:
                seen.add(parent)
                todo.append(parent)


def _dominators(outputs: list[Tensor], leaf: Tensor) -> set[Value]:
    """Exact path counting: a value through which all paths leaf -> outputs pass is a dominator. Linear in the graph."""
    roots = [v for t in outputs if (v := value_of(t))]
    order, seen, todo = [], set(), [(v[0], False) for v in roots]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo += [
                (parent, False)
                for parent, _ in node.next_functions
                if parent is not None and parent not in seen
            ]
    below: dict[Any, int] = {}  # paths from the leaf up to a node
    for node in order:
        is_leaf = getattr(node, "variable", None) is leaf
        below[node] = (
            1 if is_leaf else sum(below[p] for p, _ in node.next_functions if p is not None)
        )
    above: dict[Any, int] = defaultdict(int)  # paths from a node up to the outputs
    through: dict[Value, int] = defaultdict(int)
    for value in roots:
        above[value[0]] += 1
        through[value] += 1
    for node in reversed(order):
        for parent, number in node.next_functions:
            if parent is not None and above[node]:
                above[parent] += above[node]
                through[parent, number] += above[node]
    total = sum(below[v[0]] for v in roots)
    return {v for v, paths in through.items() if total and paths * below[v[0]] == total}
