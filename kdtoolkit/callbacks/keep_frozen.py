"""Frozen parts of the student stay in eval mode while the rest is trained."""

from __future__ import annotations

from typing import Any

from kdtoolkit.core.callback import Callback
from kdtoolkit.models.freezing import FrozenParts


class KeepFrozen(Callback):
    """Every epoch and every evaluation ends in train(): frozen parts go back to eval mode before the next batch."""

    def __init__(self, still: FrozenParts):
        self.still = still

    def on_epoch_start(self, run: Any) -> None:
        self.still.stay()

    def on_step_end(self, run: Any, step: Any) -> None:
        self.still.stay()
