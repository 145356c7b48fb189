"""The seven events of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..types import Batch, Step


@dataclass
class Ahead:
    """What is known of a run before anything is written. data is None in a dry run of a preset."""

    method: Any
    data: Any
    settings: Any
    callbacks: list[Callback]


def in_order(method: Any, given: Sequence[Callback]) -> list[Callback]:
    """The callbacks of a method and of a user by their `order`; ValueError where two have one name."""
    callbacks = sorted([*method.callbacks, *given], key=lambda c: c.order)
    names = [c.name for c in callbacks if c.name]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ValueError(f"two callbacks are named {twice!r}: give one of them another `name`, states go by name")
    return callbacks


def several(callback: Callback, method: Any) -> None:
    """ValueError unless the method trains two networks or more."""
    count = len(method.networks())
    if count < 2:
        raise ValueError(
            f"{type(callback).__name__} needs two networks or more, this run trains {count}: use Peers([...])"
        )


class Callback:
    """Watches a run, edits weights between steps, or returns extra losses made from logits. Override what you need.

    `name` is the key under which its state is saved; give two callbacks of one class different names. `order` is its
    place among the callbacks of a run, at every event: DCLMerger 10, EMATeacher 20, DecayingEnsemble 30, MutualKL 40,
    KDCL 45, all others 100; those of one place are called in the order in which they were given.
    """

    name: str = ""
    order: int = 100
    made_with: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made.made_with = args, kwargs
        return made

    def check(self, run: Any) -> None:
        """ValueError for what cannot work, before anything is written. `run` has method, data, settings, callbacks."""

    def on_fit_start(self, run: Any) -> None:
        """Models, data and optimizer are ready; a resumed run has its state back."""

    def on_epoch_start(self, run: Any) -> None: ...

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The forward is done. Return named, weighted losses (scalars) to add to the method's, or None."""
        return None

    def on_grads(self, run: Any) -> None:
        """Gradients are complete and synchronised, the optimizer has not stepped."""

    def on_step_end(self, run: Any, step: Step) -> None: ...

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        """Evaluated; `metrics` holds this epoch's numbers."""

    def on_fit_end(self, run: Any) -> None:
        """Also called when a run ends early or fails, so that files and progress bars are closed."""

    def plan(self) -> list[dict[str, Any]]:
        """Rows of the plan for the losses that it adds: {"loss", "weight", "student", "teacher"}."""
        return []

    def notes(self) -> list[str]:
        """Sentences for the plan, on what it does that is no loss."""
        return []

    # A callback may keep networks that are not trained but averaged, such as an EMA teacher:
    def networks(self) -> dict[str, nn.Module]:
        """Its complete networks by name; evaluated and saved with those of the method."""
        return {}

    def products(self) -> tuple[list[str], str] | None:
        """As `Method.products`; the first callback that names some decides."""
        return None

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of its networks for images in [0, 1], for evaluation; in eval mode, and left in train mode."""
        return {}

    def sync(self) -> None:
        """As `Method.sync`, for its networks."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
