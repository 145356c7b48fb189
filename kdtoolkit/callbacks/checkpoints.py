"""checkpoints/last after every epoch, checkpoints/best when the monitored accuracy rose; without a folder in memory."""

from __future__ import annotations

import copy
from typing import Any

from kdtoolkit.core.callback import Callback
from kdtoolkit.utils import checkpoint


class Checkpoints(Callback):
    """Writes both checkpoints atomically. `every`: epochs between two of checkpoints/last (the end always is)."""

    def __init__(self, every: int = 1):
        if every < 1:
            raise ValueError(f"every is {every}, checkpoints are written each 1, 2, ... epochs")
        self.every = every
        self.best_weights: tuple[dict[str, Any], dict[str, Any]] | None = (
            None  # method's, callbacks' by name
        )

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        run.check_finite(weights=True)  # broken weights never take the place of good ones
        improved = bool(metrics.get("improved"))
        if run.output_dir is None:
            if improved:
                run.sync()
                kept = {
                    c.name: copy.deepcopy(c.state_dict()) for c in run.callbacks if c.networks()
                }
                self.best_weights = (
                    {k: v.detach().cpu().clone() for k, v in run.method.state_dict().items()},
                    kept,
                )
            return
        over = run.clock.step >= run.clock.total_steps or run.stop
        if improved or over or run.clock.epoch % self.every == 0:
            last = run.save("last")
            if improved and run.accelerator.is_main_process:
                checkpoint.copy(last, last.with_name("best"))
            run.accelerator.wait_for_everyone()
