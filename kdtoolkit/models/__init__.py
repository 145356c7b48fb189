"""Networks: CIFAR families, registered with timm by this import; loading, saving, weights, heads, freezing."""

from typing import TYPE_CHECKING

from kdtoolkit.models import densenet as densenet
from kdtoolkit.models import mobilenetv2 as mobilenetv2
from kdtoolkit.models import resnet as resnet
from kdtoolkit.models import shufflenet as shufflenet
from kdtoolkit.models import vgg as vgg
from kdtoolkit.models import wrn as wrn
from kdtoolkit.utils.lazy_import import lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit.features.preprocess import normalisation as normalisation
    from kdtoolkit.models.describe import fixed_input_size as fixed_input_size
    from kdtoolkit.models.describe import input_size as input_size
    from kdtoolkit.models.describe import spec_of as spec_of
    from kdtoolkit.models.loading import is_timm_name as is_timm_name
    from kdtoolkit.models.loading import load_model as load_model
    from kdtoolkit.models.saving import save_model as save_model
    from kdtoolkit.models.weights import load_weights as load_weights

_PUBLIC = {
    "fixed_input_size": "kdtoolkit.models.describe",
    "input_size": "kdtoolkit.models.describe",
    "is_timm_name": "kdtoolkit.models.loading",
    "load_model": "kdtoolkit.models.loading",
    "load_weights": "kdtoolkit.models.weights",
    "normalisation": "kdtoolkit.features.preprocess",
    "save_model": "kdtoolkit.models.saving",
    "spec_of": "kdtoolkit.models.describe",
}
_RENAMED = {  # of 0.1; they go with the next release
    "build": ("load_model", "kdtoolkit.models.loading"),
    "is_name": ("is_timm_name", "kdtoolkit.models.loading"),
    "put": ("load_weights", "kdtoolkit.models.weights"),
    "save": ("save_model", "kdtoolkit.models.saving"),
}
__all__ = sorted([*_PUBLIC, "densenet", "mobilenetv2", "resnet", "shufflenet", "vgg", "wrn"])
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC, _RENAMED)
