"""kdtoolkit: knowledge distillation for any timm model, in one call or one launch."""

from . import callbacks, data, functional, methods, metrics, models, objectives, schedules
from .api import DistillResult, distill
from .callbacks import Callback
from .method import Method, Objective
from .methods import create_method, list_methods
from .modules import Adapter
from .taps import Frozen, Taps

__version__ = "0.1.0"
__all__ = [
    "Adapter", "Callback", "DistillResult", "Frozen", "Method", "Objective", "Taps", "callbacks", "create_method",
    "data", "distill", "functional", "list_methods", "methods", "metrics", "models", "objectives", "schedules",
]  # fmt: skip
