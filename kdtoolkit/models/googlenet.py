"""GoogLeNet, Inception-V1 (Szegedy et al. 2015), of torchvision, as a timm model.

Stages: what follows a pooling layer; strides 4, 8, 16, 32.

Differs from torchvision: no auxiliary heads; its weights are for images normalised with mean and
standard deviation 0.5, which torchvision does inside the network.
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        "googlenet.tv_in1k": {
            "url": "https://download.pytorch.org/models/googlenet-1378be20.pth",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv1.conv",
            "classifier": "fc",
        }
    }
)
NUM_FEATURES = 1024
FEATURE_INFO = (
    {"num_chs": 192, "reduction": 4, "module": "conv3"},
    {"num_chs": 480, "reduction": 8, "module": "inception3b"},
    {"num_chs": 832, "reduction": 16, "module": "inception4e"},
    {"num_chs": NUM_FEATURES, "reduction": 32, "module": "inception5b"},
)


@functools.cache
def _network_class() -> type[nn.Module]:
    """The network; torchvision's models are imported when the first one is made."""
    from torchvision.models import GoogLeNet as TorchvisionGoogLeNet

    class GoogLeNet(TorchvisionGoogLeNet):  # type: ignore[misc]
        """torchvision's network with timm's interface."""

        def __init__(
            self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.2
        ) -> None:
            super().__init__(
                num_classes=num_classes, aux_logits=False, init_weights=True, dropout=drop_rate
            )
            self.num_features = NUM_FEATURES
            self.feature_info = [dict(row) for row in FEATURE_INFO]
            if in_chans != 3:
                old = self.conv1.conv
                self.conv1.conv = nn.Conv2d(
                    in_chans, old.out_channels, old.kernel_size[0], old.stride[0], old.padding[0],
                    bias=False,
                )  # fmt: skip
            self.reset_classifier(num_classes)

        def get_classifier(self) -> nn.Module:
            """The last linear layer."""
            return self.fc

        def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
            """Put a new last layer, without one for 0 classes."""
            self.num_classes = num_classes
            self.fc: nn.Module = nn.Identity()
            if num_classes:
                self.fc = nn.Linear(NUM_FEATURES, num_classes)

    return GoogLeNet


def _without_auxiliary_heads(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("aux")}


@register_model
def googlenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GoogLeNet, Inception-V1, without auxiliary heads; 6.0 million parameters.

    Args:
        pretrained: Whether it has torchvision's ImageNet weights.
        **kwargs: num_classes, in_chans, drop_rate.

    Returns:
        The network.
    """
    model: nn.Module = build_model_with_cfg(
        _network_class(), "googlenet", pretrained, pretrained_filter_fn=_without_auxiliary_heads,
        **kwargs,
    )  # fmt: skip
    return model
