"""Callbacks: one idea, one file."""

from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.decaying import DecayingEnsemble
from kdtoolkit.callbacks.diversity import Diversity, HomogeneityWarning
from kdtoolkit.callbacks.early_stop import EarlyStop
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.callbacks.kdcl import KDCL
from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.callbacks.trackers import Trackers
from kdtoolkit.core.callback import Callback

__all__ = [
    "KDCL", "Callback", "Checkpoints", "DCLMerger", "DecayingEnsemble", "Diversity", "EMATeacher", "EarlyStop",
    "HomogeneityWarning", "MutualKL", "ProgressLog", "Trackers",
]  # fmt: skip
