"""Ends a run whose monitored accuracy has not risen for some evaluations."""

from __future__ import annotations

from typing import Any

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext, RunPreview
from kdtoolkit.utils.validation import check_number, check_whole_number


class EarlyStop(Callback):
    """Ends a run when the accuracy on the validation split no longer rises.

    Args:
        patience: Evaluations without a rise after which the run ends, from 1.
        min_delta: Percent points of top-1 that count as a rise, from 0.

    Raises:
        ValueError: For a number that is not allowed.
    """

    name = "early_stop"

    def __init__(self, patience: int = 10, *, min_delta: float = 0.0) -> None:
        check_whole_number("patience", patience, meaning="evaluations without a rise")
        check_number("min_delta", min_delta, minimum=0, maximum=100, meaning="percent points")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = -1.0, 0

    def check(self, run: RunPreview) -> None:
        """Refuse a run without a validation split."""
        if run.config.monitor is None:
            raise ValueError(
                "EarlyStop watches a validation split and there is none: set validation='auto' or "
                "a share"
            )

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Count evaluations without a rise."""
        top1 = metrics.get("monitored")
        if top1 is None:
            return
        if top1 > self.best + self.min_delta:
            self.best, self.waited = top1, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop = f"top-1 has not risen above {self.best:.2f} % for {self.waited} evaluations"

    def state_dict(self) -> dict[str, Any]:
        """The best accuracy and the count."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best accuracy and the count."""
        self.best, self.waited = state["best"], state["waited"]
