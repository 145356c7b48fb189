"""Networks: CIFAR families registered with timm by this import, and a model from a name, a folder or a file."""

from kdtoolkit.models import densenet, mobilenetv2, resnet, shufflenet, vgg, wrn
from kdtoolkit.models.build import build, is_name
from kdtoolkit.models.describe import fixed_input_size, input_size, normalisation, spec_of
from kdtoolkit.models.folder import save
from kdtoolkit.models.weights import put

__all__ = ["build", "fixed_input_size", "input_size", "is_name", "normalisation", "put", "save", "spec_of"]
__all__ += ["densenet", "mobilenetv2", "resnet", "shufflenet", "vgg", "wrn"]
