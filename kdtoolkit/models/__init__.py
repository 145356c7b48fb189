"""Networks: CIFAR families registered with timm by this import; loading, saving, weights, heads, freezing."""

from kdtoolkit.features.preprocess import normalisation
from kdtoolkit.models import densenet, mobilenetv2, resnet, shufflenet, vgg, wrn
from kdtoolkit.models.describe import fixed_input_size, input_size, spec_of
from kdtoolkit.models.loading import is_timm_name, load_model
from kdtoolkit.models.saving import save_model
from kdtoolkit.models.weights import load_weights

__all__ = [
    "fixed_input_size",
    "input_size",
    "is_timm_name",
    "load_model",
    "load_weights",
    "normalisation",
]
__all__ += [
    "save_model",
    "spec_of",
    "densenet",
    "mobilenetv2",
    "resnet",
    "shufflenet",
    "vgg",
    "wrn",
]
