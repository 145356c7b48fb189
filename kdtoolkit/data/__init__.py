"""Data in: any source becomes train, validation and test splits; batches are augmented on the training device."""

from .augment import BatchAugment, hash_uniform
from .bundle import Data, Split
from .loading import load
from .presets import PRESETS
from .sampling import Mixed, SameClass

__all__ = ["PRESETS", "BatchAugment", "Data", "Mixed", "SameClass", "Split", "hash_uniform", "load"]
