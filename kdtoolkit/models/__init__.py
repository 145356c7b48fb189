"""Networks: the CIFAR families, and what loading, saving and fine-tuning a network needs.

Importing this package registers the CIFAR families with timm. Its public names are imported when
they are used.
"""

from typing import TYPE_CHECKING

# Only these are imported at once, as this import may happen inside `import timm`
from kdtoolkit.models import densenet as densenet
from kdtoolkit.models import googlenet as googlenet
from kdtoolkit.models import mobilenetv2 as mobilenetv2
from kdtoolkit.models import resnet as resnet
from kdtoolkit.models import shufflenet as shufflenet
from kdtoolkit.models import vgg as vgg
from kdtoolkit.models import wrn as wrn
from kdtoolkit.utils.lazy_import import lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit.features.model_inputs import normalisation as normalisation
    from kdtoolkit.models.describe import describe_model as describe_model
    from kdtoolkit.models.describe import fixed_input_size as fixed_input_size
    from kdtoolkit.models.describe import input_size as input_size
    from kdtoolkit.models.freezing import FrozenParts as FrozenParts
    from kdtoolkit.models.head import classifier_names as classifier_names
    from kdtoolkit.models.head import num_outputs as num_outputs
    from kdtoolkit.models.head import replace_head as replace_head
    from kdtoolkit.models.layer_groups import layer_numbers as layer_numbers
    from kdtoolkit.models.loading import is_timm_name as is_timm_name
    from kdtoolkit.models.loading import load_model as load_model
    from kdtoolkit.models.reinit import reinitialised_copy as reinitialised_copy
    from kdtoolkit.models.saving import save_model as save_model
    from kdtoolkit.models.weights import load_weights as load_weights

_PUBLIC = {
    "FrozenParts": "kdtoolkit.models.freezing",
    "classifier_names": "kdtoolkit.models.head",
    "describe_model": "kdtoolkit.models.describe",
    "fixed_input_size": "kdtoolkit.models.describe",
    "input_size": "kdtoolkit.models.describe",
    "is_timm_name": "kdtoolkit.models.loading",
    "layer_numbers": "kdtoolkit.models.layer_groups",
    "load_model": "kdtoolkit.models.loading",
    "load_weights": "kdtoolkit.models.weights",
    "normalisation": "kdtoolkit.features.model_inputs",
    "num_outputs": "kdtoolkit.models.head",
    "reinitialised_copy": "kdtoolkit.models.reinit",
    "replace_head": "kdtoolkit.models.head",
    "save_model": "kdtoolkit.models.saving",
}
_RENAMED = {  # names of 0.1, which the next release drops
    "build": ("load_model", "kdtoolkit.models.loading"),
    "is_name": ("is_timm_name", "kdtoolkit.models.loading"),
    "put": ("load_weights", "kdtoolkit.models.weights"),
    "save": ("save_model", "kdtoolkit.models.saving"),
    "spec_of": ("describe_model", "kdtoolkit.models.describe"),
}
_FAMILIES = ("densenet", "googlenet", "mobilenetv2", "resnet", "shufflenet", "vgg", "wrn")
__all__ = sorted([*_PUBLIC, *_FAMILIES])
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC, _RENAMED)
