"""Ends a run whose monitored accuracy has not risen for some evaluations."""

from __future__ import annotations

from typing import Any

from kdtoolkit.core.callback import Callback


class EarlyStop(Callback):
    """patience: evaluations without a rise of more than `min_delta` percent points of the monitored top-1."""

    name = "early_stop"

    def __init__(self, patience: int = 10, *, min_delta: float = 0.0):
        if patience < 1:
            raise ValueError(f"patience is {patience}, it must be at least one evaluation")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = -1.0, 0

    def check(self, run: Any) -> None:
        if run.config.monitor is None:
            raise ValueError(
                "EarlyStop watches a validation split and there is none: set validation='auto' or a share"
            )

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
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
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
