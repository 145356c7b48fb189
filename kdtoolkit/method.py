"""Objective, Method, Strategy: one loss between two outputs; the module that owns every trained parameter; a name for
networks that are trained together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .callbacks.base import Callback
from .preprocess import Preprocess
from .registry import Registry, defaults_of
from .taps import Frozen, Taps
from .types import Batch, Clock, Out, Shape, Stage, Step, Weight


class Objective(nn.Module):
    """One paper's loss between two outputs: `objective(student, teacher, batch) -> unweighted scalar`.

    A subclass gets `(student: Taps, teacher: Frozen, pairs)` and its options by keyword, builds everything from their
    shapes, and leaves in `self.pairs` the (student tap, teacher tap) pairs that it reads. `needs_teacher` is False for
    losses on labels alone, `needs_taps` for losses on logits alone.
    """

    needs_teacher = True
    needs_taps = True

    def __init__(self, student: Taps, teacher: Frozen | None, pairs: Sequence[tuple[Stage, Stage]] = ()):
        super().__init__()
        if self.needs_taps and not pairs:
            raise ValueError(
                f"{type(self).__name__} compares features: give pairs of taps, [(student tap, teacher tap)]"
            )
        self.pairs = [(student.key(s), t if teacher is None else teacher.key(t)) for s, t in pairs]

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        raise NotImplementedError

    def features(self, student: Out, teacher: Out) -> tuple[list[Tensor], list[Tensor]]:
        """The paired features, students' and teachers'."""
        return [student.feats[s] for s, _ in self.pairs], [teacher.feats[t] for _, t in self.pairs]

    def describe(self) -> list[dict[str, Any]]:
        """Rows for the plan: student tap, teacher tap, what stands between them."""
        adapters = getattr(self, "adapters", None)
        rows = []
        for i, (s, t) in enumerate(self.pairs):
            adapter = adapters[i] if adapters is not None and i < len(adapters) else None
            rows.append({"student": s, "teacher": t, "adapter": adapter})
        return rows


def shapes_of(taps: Taps, keys: Sequence[Stage]) -> list[Shape]:
    """Shapes of taps before any hook is placed."""
    return [taps.end(k).shape for k in keys]


class Method(nn.Module):
    """Owns every trained parameter: `method(batch, clock) -> Step(losses, logits, logs)`, losses weighted.

    The only thing that accelerate prepares. `teachers` are outside of the module tree: no gradient, no checkpoint.

    num_views  augmentations of each training image that it reads
    callbacks  those that are a part of it; the run calls them with the user's, in the order of `Callback.order`
    sampling   (labels (N,) int64, batch size, seed) -> a batch sampler with set_epoch; None draws rows evenly
    unlabelled whether rows without a label (y = -1) are of use to it
    no_compile why its networks cannot be compiled, None where they can
    alone      every process trains networks of its own on the whole batch, and gradients are not averaged
    """

    teachers: tuple[Frozen, ...] = ()
    num_views: int = 1
    callbacks: tuple[Callback, ...] = ()
    sampling: Callable[..., Any] | None = None
    unlabelled: bool = False
    no_compile: str | None = None
    alone: bool = False

    def forward(self, batch: Batch, clock: Clock) -> Step:
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """Every network that is trained, complete, by name."""
        raise NotImplementedError

    def products(self) -> tuple[list[str], str]:
        """Names of networks one of which a run hands over (the best on the validation split; without one the first),
        and why these."""
        return [next(iter(self.networks()))], "it is the network that was asked for"

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of one network for images in [0, 1], for evaluation."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """For evaluation: logits (B, C) of every network for images in [0, 1], and of ensembles that it trains."""
        return {name: self.logits(name, x) for name in self.networks()}

    def each(self, batch: Batch) -> dict[str, Tensor]:
        """In training: logits (B, C) of every network for a batch, each on its own view."""
        return {name: self.logits(name, batch["x"]) for name in self.networks()}

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that this process trains, by name."""
        return dict(self.named_parameters())

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Where processes train networks of their own: all of them, and what the optimizer knows of them, everywhere.
        All ranks call it before an evaluation and a checkpoint."""

    def clipped(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients share one norm where it is limited: networks that do not know of each other
        have one each."""
        return [list(self.parameters())]

    def place(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Put the teachers on the device; the engine moves the module itself. Under autocast their BatchNorms are
        folded: its rounding is a thousand times that of folding."""
        for teacher in self.teachers:
            teacher.to(device=device, memory_format=memory_format)
            if autocast is not None:
                teacher.fold(autocast)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        if self.no_compile:
            raise ValueError(f"compile=True: {self.no_compile}; leave compile out")
        raise NotImplementedError

    def release(self) -> None:
        """Take all hooks off, give the teachers back as they were."""

    def plan(self) -> dict[str, Any]:
        """What the plan prints: rows of losses, taps, shapes, adapters; parameter counts."""
        return {}


class Recipe:
    """What a registered name stands for: which losses with which weights by default."""

    def __init__(self, losses: dict[str, Weight], title: str):
        self.losses, self.title = losses, title


@dataclass
class Given:
    """What a strategy builds its Method from.

    student   the first network, tapped;  teachers  frozen ones, none for most strategies
    weights   {term: number or schedule}, every term of the strategy; 0 for one that was left out of losses={...}
    another   (k, spec=None) -> network number k = 1, 2, ... of the team: the student's architecture, or that of `spec`
              (a name or a module), with weights of its own
    """

    student: Taps
    teachers: Sequence[Frozen]
    weights: Mapping[str, Weight]
    image: tuple[int, int] | None
    preprocess: Preprocess
    another: Callable[..., nn.Module]


class Strategy(Recipe):
    """A name for networks that are trained together: `build(given, *, options) -> Method`. Its losses are terms of that
    Method, not Objectives. `options` holds their defaults by name."""

    def __init__(self, losses: dict[str, Weight], title: str, build: Callable[..., Method], needs_teacher: bool):
        super().__init__(losses, title)
        self.build, self.needs_teacher, self.options = build, needs_teacher, defaults_of(build)


OBJECTIVES: Registry[type[Objective]] = Registry("loss")
METHODS: Registry[Recipe] = Registry("method")


def objective(name: str, *, losses: dict[str, Weight] | None = None, title: str = "") -> Any:
    """Class decorator: register an Objective as a loss, and, with `losses`, as a method with these default weights."""

    def register(cls: type[Objective]) -> type[Objective]:
        OBJECTIVES.add(name)(cls)
        cls.registered = name  # type: ignore[attr-defined]
        if losses is not None:
            METHODS.add(name)(Recipe(losses, title or (cls.__doc__ or "").strip().split("\n")[0]))
        return cls

    return register


def strategy(name: str, *, losses: dict[str, Weight], title: str, needs_teacher: bool = False) -> Any:
    """Function decorator: register `build(given: Given, *, options) -> Method` as a method with these terms and default
    weights. The keyword-only parameters are the options that distill() passes on."""

    def register(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS.add(name)(Strategy(losses, title, build, needs_teacher))
        return build

    return register
