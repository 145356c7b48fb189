"""Callbacks: one idea, one file. The events and their order are described at `Callback`."""

from typing import TYPE_CHECKING

from kdtoolkit.utils.lazy_import import lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit.callbacks.checkpoints import Checkpoints as Checkpoints
    from kdtoolkit.callbacks.dcl import DCLMerger as DCLMerger
    from kdtoolkit.callbacks.decaying import DecayingEnsemble as DecayingEnsemble
    from kdtoolkit.callbacks.diversity import CollapseWarning as CollapseWarning
    from kdtoolkit.callbacks.diversity import Diversity as Diversity
    from kdtoolkit.callbacks.early_stop import EarlyStop as EarlyStop
    from kdtoolkit.callbacks.ema import EMATeacher as EMATeacher
    from kdtoolkit.callbacks.kdcl import KDCL as KDCL
    from kdtoolkit.callbacks.mutual import MutualKL as MutualKL
    from kdtoolkit.callbacks.progress import ProgressLog as ProgressLog
    from kdtoolkit.callbacks.trackers import Trackers as Trackers
    from kdtoolkit.core.callback import Callback as Callback

_PUBLIC = {
    "Callback": "kdtoolkit.core.callback",
    "Checkpoints": "kdtoolkit.callbacks.checkpoints",
    "CollapseWarning": "kdtoolkit.callbacks.diversity",
    "DCLMerger": "kdtoolkit.callbacks.dcl",
    "DecayingEnsemble": "kdtoolkit.callbacks.decaying",
    "Diversity": "kdtoolkit.callbacks.diversity",
    "EMATeacher": "kdtoolkit.callbacks.ema",
    "EarlyStop": "kdtoolkit.callbacks.early_stop",
    "KDCL": "kdtoolkit.callbacks.kdcl",
    "MutualKL": "kdtoolkit.callbacks.mutual",
    "ProgressLog": "kdtoolkit.callbacks.progress",
    "Trackers": "kdtoolkit.callbacks.trackers",
}
_RENAMED = {  # of 0.1; they go with the next release
    "HomogeneityWarning": ("CollapseWarning", "kdtoolkit.callbacks.diversity"),
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC, _RENAMED)
