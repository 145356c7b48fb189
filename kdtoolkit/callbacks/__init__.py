"""Callbacks: one idea, one file."""

from .base import Callback
from .checkpoints import Checkpoints
from .early_stop import EarlyStop
from .progress import ProgressLog
from .trackers import Trackers

__all__ = ["Callback", "Checkpoints", "EarlyStop", "ProgressLog", "Trackers"]
