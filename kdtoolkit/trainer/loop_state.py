"""The state of the training loop that a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

from kdtoolkit.trainer.loss_tracker import TrackerState
from kdtoolkit.trainer.stop_signal import INTERRUPTED

if TYPE_CHECKING:
    from kdtoolkit.trainer.trainer import Trainer


class LoopStateDict(TypedDict):
    """State of the loop, as a checkpoint holds it."""

    step: int
    epoch: int
    epoch_start: int
    best: dict[str, Any]
    stop: str | None
    losses: TrackerState
    callbacks: dict[str, dict[str, Any]]
    sampler: dict[str, Any]


class LoopState:
    """What a checkpoint holds of a trainer beside weights, optimizer and random states.

    States of callbacks are stored by name: a callback that was added or removed does not break
    loading.

    Args:
        run: The trainer whose state is saved and restored.
    """

    def __init__(self, run: Trainer) -> None:
        self.run = run

    def state_dict(self) -> LoopStateDict:
        """Position, best evaluation, reason to stop, open losses, states of callbacks and sampler.

        An interruption is not saved as a reason to stop: a resumed run continues.
        """
        run = self.run
        return {
            "step": run.clock.step,
            "epoch": run.clock.epoch,
            "epoch_start": run.epoch_start,
            "best": dict(run.best),
            "stop": None if run.stop == INTERRUPTED else run.stop,
            "losses": run.loss_tracker.state_dict(),
            "callbacks": {c.name: c.state_dict() for c in run.callbacks if c.name},
            "sampler": run.sampler_state.state_dict(run.clock.step > run.epoch_start),
        }

    def load_state_dict(self, state: LoopStateDict) -> None:
        """Put a state into the trainer and its callbacks.

        Args:
            state: What `state_dict` returned.
        """
        run = self.run
        run.clock.step, run.clock.epoch = state["step"], state["epoch"]
        run.epoch_start = state["epoch_start"]
        run.best, run.stop = dict(state["best"]), state["stop"]
        run.loss_tracker.load_state_dict(state["losses"], run.accelerator.device)
        for callback in run.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.name])
        run.sampler_state.load_state_dict(state["sampler"])
