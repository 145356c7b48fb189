"""Losses between a student and a teacher: one paper, one file. Importing this registers them."""

from kdtoolkit.losses.at import AT
from kdtoolkit.losses.cross_entropy import CrossEntropy
from kdtoolkit.losses.fitnet import FitNet
from kdtoolkit.losses.kd import KD, Logits
from kdtoolkit.losses.sp import SP
from kdtoolkit.losses.srkd import SRKD

__all__ = ["AT", "KD", "SP", "SRKD", "CrossEntropy", "FitNet", "Logits"]
