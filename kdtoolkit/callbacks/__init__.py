"""Callbacks: one idea, one file."""

from .base import Callback
from .checkpoints import Checkpoints
from .dcl import DCLMerger
from .decaying import DecayingEnsemble
from .diversity import Diversity, HomogeneityWarning
from .early_stop import EarlyStop
from .ema import EMATeacher
from .kdcl import KDCL
from .mutual import MutualKL
from .progress import ProgressLog
from .trackers import Trackers

__all__ = [
    "KDCL", "Callback", "Checkpoints", "DCLMerger", "DecayingEnsemble", "Diversity", "EMATeacher", "EarlyStop",
    "HomogeneityWarning", "MutualKL", "ProgressLog", "Trackers",
]  # fmt: skip
