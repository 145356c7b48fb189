"""The state of the training loop that a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdtoolkit.trainer.trainer import Trainer


class LoopState:
    """What accelerate saves beside weights and optimizer, keyed by name: a callback more or less breaks no loading."""

    def __init__(self, run: Trainer):
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        run = self.run
        states = {c.name: c.state_dict() for c in run.callbacks if c.name}
        at = {"step": run.clock.step, "epoch": run.clock.epoch, "epoch_start": run.epoch_start}
        stop = None if run.stop == "interrupted" else run.stop
        return at | {
            "best": dict(run.best),
            "stop": stop,
            "losses": run.loss_tracker.state_dict(),
            "callbacks": states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        run = self.run
        run.clock.step, run.clock.epoch, run.epoch_start = (
            state["step"],
            state["epoch"],
            state["epoch_start"],
        )
        run.best, run.stop = dict(state["best"]), state["stop"]
        run.loss_tracker.load_state_dict(state["losses"], run.accelerator.device)
        for callback in run.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.name])
