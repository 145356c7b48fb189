"""Intermediate features of any network: taps, stages, stage-reset forwarding, adapters."""

from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps, image_size
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.hooks import strip
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.features.reset_check import find_reset_leaks

__all__ = ["Adapter", "Frozen", "Preprocess", "Taps", "find_reset_leaks", "image_size", "strip"]
