"""Data in: any source becomes train, validation and test splits; batches are augmented on the training device."""

from kdtoolkit.data.augment import BatchAugment, hash_uniform
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.loading import load
from kdtoolkit.data.presets import PRESETS
from kdtoolkit.data.sampling import Mixed, SameClass

__all__ = ["PRESETS", "BatchAugment", "Data", "Mixed", "SameClass", "Split", "hash_uniform", "load"]
