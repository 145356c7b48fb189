"""The seven events of a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..types import Batch, Step


class Callback:
    """Watches a run, edits weights between steps, or returns extra losses made from logits. Override what you need.

    `name` is the key under which its state is saved; give two callbacks of one class different names.
    """

    name: str = ""

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

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
