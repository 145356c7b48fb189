"""MobileNetV2 at half width for CIFAR (Sandler et al. 2018, arXiv 1801.04381).

Rows: those of table 2 of the paper (channels, repeats), halved, expansion 6, with strides for
32x32 images: the stem halves the resolution, and the rows of 32, 64 and 160 channels halve it
again.

Stages: the rows of one resolution, which end at 12, 16, 48, 160 channels and strides 2, 4, 8, 16;
the last 1x1 convolution is the tail.

Differs from the paper, as in the distillation papers (Tian et al. 2020, arXiv 1910.10699): ReLU for
ReLU6, and no cheaper first block (expansion 1 keeps its 1x1 convolution). The last 1x1 convolution
keeps 1280 channels.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import (
    CifarNet,
    cifar_cfgs,
    conv1x1,
    conv3x3,
    create_network,
    make_stage,
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and 1x1 projection, with a residual where the shape is kept.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the depthwise convolution.
        expand: Factor from the input channels to those in the middle.
    """

    def __init__(self, inputs: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        middle = inputs * expand
        self.residual = inputs == width and stride == 1
        self.conv = nn.Sequential(
            conv1x1(inputs, middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv1x1(middle, width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(CifarNet):
    """MobileNetV2 at half width.

    Args:
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(self, in_chans: int = 3, **head: Any) -> None:
        stages = {
            "layer1": nn.Sequential(
                InvertedResidual(16, 8, 1, expand=1),
                *make_stage(8, [12] * 2, [1, 1], InvertedResidual, expand=6),
            ),
            "layer2": make_stage(12, [16] * 3, [2, 1, 1], InvertedResidual, expand=6),
            "layer3": make_stage(
                16, [32] * 4 + [48] * 3, [2] + [1] * 6, InvertedResidual, expand=6
            ),
            "layer4": make_stage(48, [80] * 3 + [160], [2, 1, 1, 1], InvertedResidual, expand=6),
        }
        stem = {
            "conv1": conv3x3(in_chans, 16, stride=2),
            "bn1": nn.BatchNorm2d(16),
            "act1": nn.ReLU(),
        }
        tail = {"conv2": conv1x1(160, 1280), "bn2": nn.BatchNorm2d(1280), "act2": nn.ReLU()}
        super().__init__(
            stem,
            stages,
            tail,
            channels=[12, 16, 48, 160],
            strides=[2, 4, 8, 16],
            num_features=1280,
            in_chans=in_chans,
            **head,
        )


default_cfgs = cifar_cfgs("cifar_mobilenetv2_half")


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at half width (Sandler et al. 2018, arXiv 1801.04381)."""
    return create_network(MobileNetV2, "cifar_mobilenetv2_half", pretrained, stages=4, **kwargs)
