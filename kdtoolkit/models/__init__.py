"""Networks: CIFAR families registered with timm by this import, and a model from a name, a folder or a file."""

from kdtoolkit.models import densenet, mobilenetv2, resnet, shufflenet, vgg, wrn
from kdtoolkit.models.build import build
from kdtoolkit.models.describe import fixed_input_size, input_size, normalisation, spec_of
from kdtoolkit.models.folder import save

__all__ = ["build", "fixed_input_size", "input_size", "normalisation", "save", "spec_of"]
__all__ += ["densenet", "mobilenetv2", "resnet", "shufflenet", "vgg", "wrn"]
