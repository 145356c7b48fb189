"""Data: any source becomes training, validation and test splits.

Batches are augmented on the training device.

Example:
    >>> from kdtoolkit import data
    >>> digits = data.load("digits")
    >>> digits.num_classes, digits.image_size
    (10, (16, 16))
"""

from typing import TYPE_CHECKING

from kdtoolkit.utils.lazy_import import lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit.data.augment import BatchAugment as BatchAugment
    from kdtoolkit.data.dataset import Data as Data
    from kdtoolkit.data.dataset import Split as Split
    from kdtoolkit.data.loading import load as load
    from kdtoolkit.data.presets import PRESETS as PRESETS
    from kdtoolkit.data.sampling import Mixed as Mixed
    from kdtoolkit.data.sampling import SameClass as SameClass
    from kdtoolkit.data.seeding import hash_uniform as hash_uniform

_PUBLIC = {
    "PRESETS": "kdtoolkit.data.presets",
    "BatchAugment": "kdtoolkit.data.augment",
    "Data": "kdtoolkit.data.dataset",
    "Mixed": "kdtoolkit.data.sampling",
    "SameClass": "kdtoolkit.data.sampling",
    "Split": "kdtoolkit.data.dataset",
    "hash_uniform": "kdtoolkit.data.seeding",
    "load": "kdtoolkit.data.loading",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
