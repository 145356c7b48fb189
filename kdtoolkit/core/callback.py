"""Callbacks: the seven events of a run, and what a callback may use of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.types import Batch, Clock, Step

if TYPE_CHECKING:
    from kdtoolkit.core.method import Method

MetricsRow = dict[str, Any]  # one line of metrics.jsonl: "event", "epoch", "step" and numbers
PlanRow = dict[str, Any]  # one row of the plan: "loss", "weight", "student", "teacher", ...


class MetricsWriter(Protocol):
    """The rows of `metrics.jsonl`."""

    rows: list[MetricsRow]

    def add(self, **row: Any) -> None:
        """Append one row, and write it where the run has a folder."""


@dataclass
class RunPreview:
    """What is known of a run before anything is written; `Callback.check` gets it.

    Attributes:
        method: The method that will be trained.
        data: Its data; None in a dry run of a named data set.
        config: Numbers of the training loop.
        callbacks: All callbacks of the run, in their order.
    """

    method: Method
    data: Data | None
    config: TrainerConfig
    callbacks: list[Callback]


class RunContext(Protocol):
    """What a callback may use of a run. The trainer is one; write your own for a training loop of your own.

    Attributes:
        method: The method, bare (without what `accelerate` wraps around it).
        data: Training, validation and test splits.
        config: Numbers of the training loop.
        accelerator: The `accelerate.Accelerator` of the run.
        clock: Step and epoch, and how many there are.
        callbacks: All callbacks of the run, in their order.
        optimizer: The prepared optimizer.
        metrics_log: The rows of `metrics.jsonl`.
        output_dir: Folder of the run; None where nothing is written.
        best: `{"epoch", "step", "top1", "network"}` of the best evaluation; empty before the first.
        stop: Set a reason to end the run after this step.
        epoch_start: Step at which this epoch began.
        teacher_metrics: `{"teacher/<split>": {"top1": ...}}`, accuracies in percent.
    """

    method: Method
    data: Data
    config: TrainerConfig
    accelerator: Accelerator
    clock: Clock
    callbacks: list[Callback]
    optimizer: Any
    metrics_log: MetricsWriter
    output_dir: Path | None
    best: dict[str, Any]
    stop: str | None
    epoch_start: int

    @property
    def teacher_metrics(self) -> dict[str, dict[str, float]]: ...

    def export_candidates(self) -> tuple[list[str], str]:
        """Names of the networks one of which is exported, and why these."""
        ...

    def save(self, name: str = "last") -> Path | None:
        """Write `checkpoints/<name>`; every rank calls it."""
        ...

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Exchange networks that processes train on their own; every rank calls it."""
        ...

    def check_finite(self, weights: bool = False) -> None:
        """Raise `NonFiniteLoss` if a loss, or with `weights` a weight, is not finite."""
        ...

    def seed_step(self, epoch: int, step: int) -> None:
        """Seed dropout and other draws of one step."""
        ...

    def prepare_batch(self, batch: Any, train: bool) -> Batch:
        """Augment a raw batch and lay it out as the networks expect it."""
        ...

    def first_batches(self, count: int) -> AbstractContextManager[Iterator[Any]]:
        """The first `count` raw batches of the run, which will be read again."""
        ...

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        """This rank's batches of a split, for evaluation."""
        ...


def ordered_callbacks(method: Method, given: Sequence[Callback]) -> list[Callback]:
    """The callbacks of a method and of a user by their `order`; ValueError where two have one name."""
    callbacks = sorted([*method.callbacks, *given], key=lambda c: c.order)
    names = [c.name for c in callbacks if c.name]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ValueError(
            f"two callbacks are named {twice!r}: give one of them another `name`, states go by name"
        )
    return callbacks


def check_several_networks(callback: Callback, method: Method) -> None:
    """ValueError unless the method trains two networks or more."""
    count = len(method.networks())
    if count < 2:
        raise ValueError(
            f"{type(callback).__name__} needs two networks or more, this run trains {count}: use Peers([...])"
        )


# methods of a callback that had another name in 0.1
RENAMED_EVENTS = {"plan": "plan_rows", "notes": "plan_notes", "products": "export_candidates"}


class Callback:
    """Watches a run, edits weights between steps, or returns extra losses made from logits. Override what you need.

    `name` is the key under which its state is saved; give two callbacks of one class different names. `order` is its
    place among the callbacks of a run, at every event: DCLMerger 10, EMATeacher 20, DecayingEnsemble 30, MutualKL 40,
    KDCL 45, all others 100; those of one place are called in the order in which they were given.
    """

    name: str = ""
    order: int = 100
    init_arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED_EVENTS.items():
            if old in vars(cls):
                warnings.warn(
                    f"{cls.__name__}.{old} is named {new} now, and will not be called under its old name any more",
                    DeprecationWarning,
                    stacklevel=2,
                )
                setattr(cls, new, vars(cls)[old])

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made.init_arguments = args, kwargs
        return made

    def check(self, run: RunPreview) -> None:
        """ValueError for what cannot work, before anything is written. `run` has method, data, config, callbacks."""

    def on_fit_start(self, run: RunContext) -> None:
        """Models, data and optimizer are ready; a resumed run has its state back."""

    def on_epoch_start(self, run: RunContext) -> None: ...

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The forward is done. Return named, weighted losses (scalars) to add to the method's, or None."""
        return None

    def on_grads(self, run: RunContext) -> None:
        """Gradients are complete and synchronised, the optimizer has not stepped."""

    def on_step_end(self, run: RunContext, step: Step) -> None: ...

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Evaluated; `metrics` holds this epoch's numbers."""

    def on_fit_end(self, run: RunContext) -> None:
        """Also called when a run ends early or fails, so that files and progress bars are closed."""

    def plan_rows(self) -> list[PlanRow]:
        """Rows of the plan for the losses that it adds: {"loss", "weight", "student", "teacher"}."""
        return []

    def plan_notes(self) -> list[str]:
        """Sentences for the plan, on what it does that is no loss."""
        return []

    # A callback may keep networks that are not trained but averaged, such as an EMA teacher:
    def networks(self) -> dict[str, nn.Module]:
        """Its complete networks by name; evaluated and saved with those of the method."""
        return {}

    def export_candidates(self) -> tuple[list[str], str] | None:
        """As `Method.export_candidates`; the first callback that names some decides."""
        return None

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of its networks for images in [0, 1], for evaluation; in eval mode, and left in train mode."""
        return {}

    def sync(self) -> None:
        """As `Method.sync`, for its networks."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
