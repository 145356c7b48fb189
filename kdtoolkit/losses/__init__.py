"""Losses between a student and a teacher: one paper, one file. Importing this registers them."""

from kdtoolkit.losses.at import AT as AT
from kdtoolkit.losses.cross_entropy import CrossEntropy as CrossEntropy
from kdtoolkit.losses.fitnet import FitNet as FitNet
from kdtoolkit.losses.kd import KD as KD
from kdtoolkit.losses.kd import Logits as Logits
from kdtoolkit.losses.sp import SP as SP
from kdtoolkit.losses.srkd import SRKD as SRKD
