"""Objectives: one paper, one file. Importing this room registers them all."""

from .at import AT
from .cross_entropy import CrossEntropy
from .fitnet import FitNet
from .kd import KD, Logits
from .sp import SP
from .srkd import SRKD

__all__ = ["AT", "KD", "SP", "SRKD", "CrossEntropy", "FitNet", "Logits"]
