"""kdtoolkit: knowledge distillation for any timm model, in one call or one launch.

Names are imported when they are used. The CIFAR networks of the distillation papers are in timm's
registry as soon as both `kdtoolkit` and `timm` are imported.
"""

from typing import TYPE_CHECKING

from kdtoolkit.utils.lazy_import import import_after, lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit import callbacks as callbacks
    from kdtoolkit import data as data
    from kdtoolkit import features as features
    from kdtoolkit import functional as functional
    from kdtoolkit import losses as losses
    from kdtoolkit import methods as methods
    from kdtoolkit import metrics as metrics
    from kdtoolkit import models as models
    from kdtoolkit import schedules as schedules
    from kdtoolkit.core.callback import Callback as Callback
    from kdtoolkit.core.loss import DistillationLoss as DistillationLoss
    from kdtoolkit.core.method import Method as Method
    from kdtoolkit.core.registries import register_loss as register_loss
    from kdtoolkit.core.registries import register_strategy as register_strategy
    from kdtoolkit.core.run_context import RunContext as RunContext
    from kdtoolkit.core.strategy import StrategyInputs as StrategyInputs
    from kdtoolkit.features.adapters import Adapter as Adapter
    from kdtoolkit.features.extractor import Taps as Taps
    from kdtoolkit.features.frozen import Frozen as Frozen
    from kdtoolkit.methods.branches import Branches as Branches
    from kdtoolkit.methods.factory import create_method as create_method
    from kdtoolkit.methods.factory import list_methods as list_methods
    from kdtoolkit.methods.peers import Peers as Peers
    from kdtoolkit.pipeline.config import DistillConfig as DistillConfig
    from kdtoolkit.pipeline.distill import distill as distill
    from kdtoolkit.pipeline.result import DistillResult as DistillResult

__version__ = "0.1.0"

_MODULES = (
    "callbacks",
    "data",
    "features",
    "functional",
    "losses",
    "methods",
    "metrics",
    "models",
    "schedules",
)
_PUBLIC = {name: f"kdtoolkit.{name}" for name in _MODULES} | {
    "Adapter": "kdtoolkit.features.adapters",
    "Branches": "kdtoolkit.methods.branches",
    "Callback": "kdtoolkit.core.callback",
    "DistillConfig": "kdtoolkit.pipeline.config",
    "DistillResult": "kdtoolkit.pipeline.result",
    "DistillationLoss": "kdtoolkit.core.loss",
    "Frozen": "kdtoolkit.features.frozen",
    "Method": "kdtoolkit.core.method",
    "Peers": "kdtoolkit.methods.peers",
    "RunContext": "kdtoolkit.core.run_context",
    "StrategyInputs": "kdtoolkit.core.strategy",
    "Taps": "kdtoolkit.features.extractor",
    "create_method": "kdtoolkit.methods.factory",
    "distill": "kdtoolkit.pipeline.distill",
    "list_methods": "kdtoolkit.methods.factory",
    "register_loss": "kdtoolkit.core.registries",
    "register_strategy": "kdtoolkit.core.registries",
}
_RENAMED = {  # of 0.1; they go with the next release
    "Objective": ("DistillationLoss", "kdtoolkit.core.loss"),
    "objectives": ("losses", "kdtoolkit.losses"),
}
__all__ = sorted([*_PUBLIC, "__version__"])
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC, _RENAMED)
import_after("timm", "kdtoolkit.models")
