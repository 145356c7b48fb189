"""Frozen parts of the student stay in eval mode while the rest is trained."""

from __future__ import annotations

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext
from kdtoolkit.models.freezing import FrozenParts
from kdtoolkit.types import Step


class KeepFrozen(Callback):
    """Puts frozen parts back into eval mode, which every train() of the whole network ends.

    Args:
        frozen_parts: The frozen parts of the student.
    """

    def __init__(self, frozen_parts: FrozenParts) -> None:
        self.frozen_parts = frozen_parts

    def on_epoch_start(self, run: RunContext) -> None:
        """Back to eval mode."""
        self.frozen_parts.set_eval_mode()

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """Back to eval mode."""
        self.frozen_parts.set_eval_mode()
