"""How far a run is, for the message of one that a signal stops."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class RunPhase:
    """Where a signal came that the training loop did not take.

    Attributes:
        output_dir: Folder of the run; None where nothing is written.
        is_trained: Whether the training loop is over.
    """

    output_dir: str | os.PathLike[str] | None
    is_trained: bool = False

    def describe(self) -> str:
        """What the run had done, what is kept, and how to continue."""
        where = "after training" if self.is_trained else "before training began"
        if self.output_dir is None:
            lost = "the student is lost" if self.is_trained else "there was nothing to save"
            return f"{where}; {lost}: no output_dir was given"
        if not self.is_trained:
            return f"{where}; there was nothing to save; start again with resume='auto'"
        last = os.path.join(self.output_dir, "checkpoints", "last")
        return f"{where}; {last} is whole; resume='auto' evaluates and saves the student"
