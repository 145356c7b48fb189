"""Checkpoints: `checkpoints/last` after an epoch, `checkpoints/best` when the accuracy rose."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext
from kdtoolkit.utils import checkpoint_store
from kdtoolkit.utils.validation import check_whole_number


class Checkpoints(Callback):
    """Writes both checkpoints atomically; a run without a folder keeps the best weights in memory.

    Args:
        every: Epochs between two writes of `checkpoints/last`; the last epoch is always written.

    Attributes:
        best_weights: State of the method, and states of callbacks with networks by name, at the
            best epoch of a run without a folder; None before.
    """

    def __init__(self, every: int = 1) -> None:
        check_whole_number("every", every, meaning="epochs between two checkpoints")
        self.every = every
        self.best_weights: tuple[dict[str, Tensor], dict[str, dict[str, Any]]] | None = None

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Write what is due; weights that are not finite never replace good ones."""
        run.check_finite(weights=True)
        improved = bool(metrics.get("improved"))
        if run.output_dir is None:
            if improved:
                self._keep_in_memory(run)
            return
        is_over = run.clock.step >= run.clock.total_steps or bool(run.stop)
        if improved or is_over or run.clock.epoch % self.every == 0:
            last = run.save("last")
            if improved and last is not None:
                checkpoint_store.copy(run.accelerator, last, last.with_name("best"))
            run.accelerator.wait_for_everyone()

    def _keep_in_memory(self, run: RunContext) -> None:
        run.sync()
        states = {c.name: copy.deepcopy(c.state_dict()) for c in run.callbacks if c.networks()}
        weights = {k: v.detach().cpu().clone() for k, v in run.method.state_dict().items()}
        self.best_weights = weights, states
