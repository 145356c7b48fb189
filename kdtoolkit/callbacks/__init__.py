"""Callbacks: one idea, one file."""

from .base import Callback
from .checkpoints import Checkpoints
from .dcl import DCLMerger
from .early_stop import EarlyStop
from .mutual import MutualKL
from .progress import ProgressLog
from .trackers import Trackers

__all__ = ["Callback", "Checkpoints", "DCLMerger", "EarlyStop", "MutualKL", "ProgressLog", "Trackers"]
