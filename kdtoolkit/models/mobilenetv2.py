"""MobileNetV2 at half width for CIFAR (Sandler et al. 2018, arXiv 1801.04381; Tian et al. 2020, arXiv 1910.10699).

Rows     the paper's table 2 (channels, repeats), halved, expansion 6; strides for 32x32: the stem halves it, the rows
         of 32, 64 and 160 channels halve it again.
Stages   the rows of one resolution: 12, 16, 48, 160 channels at strides 2, 4, 8, 16; the last 1x1 is the tail.
Differs  ReLU for ReLU6 and no cheaper first block (expansion 1 keeps its 1x1), as in the distillation papers; the last
         1x1 keeps 1280 channels.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import CifarNet, chain, cifar_cfgs, conv1x1, conv3x3, create


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        middle = inputs * expand
        self.residual = inputs == width and stride == 1
        self.conv = nn.Sequential(
            *(conv1x1(inputs, middle), nn.BatchNorm2d(middle), nn.ReLU()),
            *(
                nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
                nn.BatchNorm2d(middle),
                nn.ReLU(),
            ),
            *(conv1x1(middle, width), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(CifarNet):
    def __init__(self, in_chans: int = 3, **head: Any) -> None:
        stages = {
            "layer1": nn.Sequential(
                InvertedResidual(16, 8, 1, expand=1),
                *chain(8, [12] * 2, [1, 1], InvertedResidual, expand=6),
            ),
            "layer2": chain(12, [16] * 3, [2, 1, 1], InvertedResidual, expand=6),
            "layer3": chain(16, [32] * 4 + [48] * 3, [2] + [1] * 6, InvertedResidual, expand=6),
            "layer4": chain(48, [80] * 3 + [160], [2] + [1] * 3, InvertedResidual, expand=6),
        }
        stem = {
            "conv1": conv3x3(in_chans, 16, stride=2),
            "bn1": nn.BatchNorm2d(16),
            "act1": nn.ReLU(),
        }
        tail = {"conv2": conv1x1(160, 1280), "bn2": nn.BatchNorm2d(1280), "act2": nn.ReLU()}
        shape: dict[str, Any] = dict(
            channels=[12, 16, 48, 160], strides=[2, 4, 8, 16], num_features=1280
        )
        super().__init__(stem, stages, tail, in_chans=in_chans, **shape, **head)


default_cfgs = cifar_cfgs("cifar_mobilenetv2_half")


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> MobileNetV2:
    return create(MobileNetV2, "cifar_mobilenetv2_half", pretrained, stages=4, **kwargs)
