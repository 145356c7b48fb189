"""The end of a stage of a traced network: the tensors that leave it, and whether the network can be cut there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from kdtoolkit.features.feature_layout import layout
from kdtoolkit.features.tracing import Call, Trace, Value, reaches, touches
from kdtoolkit.types import Shape


@dataclass(frozen=True)
class BoundaryTensor:
    """One tensor at the end of a stage: an output of `module`, whole ("") or a member of a tuple ("[1]")."""

    module: str
    path: str
    leaf: int  # its place among the leaves of the output
    shape: Shape
    value: Value
    left: int  # when the module returned
    read: bool = True  # something later reads it; what nothing reads is not replaced
    takers: tuple[
        str, ...
    ] = ()  # if any, it is replaced where these modules take it and not where it is returned

    @property
    def name(self) -> str:
        return self.module + self.path


@dataclass(frozen=True)
class StageBoundary:
    """The end of one stage: the tensors that leave it, of which the main one is its feature. A reset of the next stage
    replaces those that are read."""

    parts: tuple[BoundaryTensor, ...]
    main: int
    stride: float  # image height over the height of the feature's grid
    cut: bool  # every path from image to logits passes these tensors: the stage can be reset here
    overwritten: bool = False  # something later writes into one of the tensors in place

    @property
    def left(self) -> int:
        """When the last of its modules returned."""
        return max(part.left for part in self.parts)

    @property
    def name(self) -> str:
        return self.parts[self.main].name

    @property
    def shape(self) -> Shape:
        return self.parts[self.main].shape

    @property
    def boundary(self) -> list[BoundaryTensor]:
        """What has to be replaced to reset the next stage."""
        return [part for part in self.parts if part.read]

    @property
    def values(self) -> list[Value]:
        return [part.value for part in self.parts]


def stage_at(
    tr: Trace,
    name: str | Iterable[str],
    channels: int | None = None,
    stride: float | None = None,
    deepen: bool = False,
) -> StageBoundary | None:
    """The stage that ends where these modules return ("stages.2", or "stage2[1]" for a member of a tuple); None unless
    each runs once and returns an image-dependent feature.

    channels, stride  of the feature, where a table says them
    deepen            names the innermost modules that return the same
    """
    parts: list[BoundaryTensor] = []
    calls = []
    names = [name] if isinstance(name, str) else list(name)
    if channels is None and len(names) == 1:
        channels = next(
            (e.get("num_chs") for e in tr.table if e["module"] == split_tensors(names[0])[0]), None
        )
    for text in names:
        module, path = split_tensors(text)
        call = tr.once(module)
        if call is None:
            return None
        calls.append(call)
        parts += [p for p in _parts(tr, call, channels, stride) if path in ("", p.path)]
    if not parts:
        return None
    cut, written = _is_cut(tr, [p.value for p in parts]), any(call.overwritten for call in calls)
    main = min(range(len(parts)), key=lambda i: _unlike(tr, parts[i].shape, channels, stride))
    if cut and len(parts) > 1:
        parts = [
            part if used else dataclasses.replace(part, read=False)
            for part, used in _used(tr, parts)
        ]
        main, parts = _only(parts, main)
    stage = StageBoundary(
        tuple(parts), main, tr.x.shape[2] / parts[main].shape.grid[0], cut, written
    )
    return deepened(tr, stage) if deepen else stage


def split_tensors(name: str) -> tuple[str, str]:
    """ "stage2[1]" -> ("stage2", "[1]")."""
    module, bracket, rest = name.partition("[")
    return module, bracket + rest


def _parts(
    tr: Trace, call: Call, channels: int | None, stride: float | None
) -> list[BoundaryTensor]:
    parts = []
    for leaf, path, sizes, value in zip(
        call.leaves, call.paths, call.shapes, call.values, strict=True
    ):
        known = (
            len(call.values) == 1 or channels in sizes[1:]
        )  # what a table says is said of one of several
        shape = layout(tr, sizes, channels if known else None, stride if known else None, call.name)
        if shape is None:
            return []
        parts.append(BoundaryTensor(call.name, path, leaf, shape, value, call.left))
    return parts


def _unlike(tr: Trace, shape: Shape, channels: int | None, stride: float | None) -> float:
    """How unlike the stage's feature one of its tensors is; the smallest is the main one."""
    away = 10.0 * (channels not in (None, shape.channels)) + 5.0 * (
        shape.layout in ("NC", "NCL", "windows")
    )
    return away + (abs(math.log2(tr.x.shape[2] / shape.grid[0] / stride)) if stride else 0.0)


def _is_cut(tr: Trace, values: list[Value]) -> bool:
    if len(values) == 1:
        return values[0] in tr.dominators
    return not reaches(tr.logits, tr.x, values)


def _used(tr: Trace, parts: list[BoundaryTensor]) -> list[tuple[BoundaryTensor, bool]]:
    """Whether something later reads each part. (One that could be left out because another makes up for it must stay:
    what is computed from it inside the module would not be replaced.)"""
    keep = list(parts)
    for part in parts:
        others = [other.value for other in keep if other is not part]
        if others and not touches(tr.logits, part.value, others):
            keep.remove(part)
    return [(part, part in keep) for part in parts]


def _only(parts: list[BoundaryTensor], main: int) -> tuple[int, list[BoundaryTensor]]:
    """Without the parts that nothing reads, but for the feature itself; and where that is now."""
    kept = [part for i, part in enumerate(parts) if part.read or i == main]
    return kept.index(parts[main]), kept


def deepened(tr: Trace, stage: StageBoundary) -> StageBoundary:
    """Each module as its innermost one."""
    return dataclasses.replace(stage, parts=tuple(_deep(tr, part) for part in stage.parts))


def _deep(tr: Trace, part: BoundaryTensor) -> BoundaryTensor:
    call = tr.once(innermost(tr, part.module))
    return part if call is None else dataclasses.replace(part, module=call.name, left=call.left)


def innermost(tr: Trace, name: str) -> str:
    """The last block and not the Sequential around it, as far as both return the same: gradient checkpointing, and some
    models, call the blocks of a Sequential and not itself."""
    modules = dict(tr.model.named_modules())
    while isinstance(modules[name], nn.Sequential) and len(modules[name]):
        inner = f"{name}.{list(modules[name]._modules)[-1]}"
        call, outer = tr.once(inner), tr.once(name)
        if call is None or (name in tr.calls and (outer is None or call.values != outer.values)):
            break
        name = inner
    return name
