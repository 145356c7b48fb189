"""Wide residual networks (Zagoruyko, Komodakis 2016, arXiv 1605.07146).

Depth    6n + 4, n pre-activation blocks in each of three stages of 16k, 32k, 64k channels at strides 1, 2, 4.
Stages   end before the BatchNorm and ReLU that follow them: raw sums.
Differs  no dropout inside the blocks. "WRN-20-8" is no wide ResNet: see resnet.py.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import (
    CifarNet,
    blocks_per_stage,
    chain,
    cifar_cfgs,
    conv1x1,
    conv3x3,
    create,
)


class WideBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; where the shape changes the 1x1 shortcut starts after the first ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.shortcut = conv1x1(inputs, width, stride) if inputs != width or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(CifarNet):
    def __init__(self, depth: int, width: int, in_chans: int = 3, **head: Any) -> None:
        n = blocks_per_stage(depth, 4, 2, "wide ResNet")
        widths = [16, 16 * width, 32 * width, 64 * width]
        strides = [1, 2, 2]  # of each stage's first block
        stages = {
            f"block{i + 1}": chain(
                widths[i], [widths[i + 1]] * n, [strides[i]] + [1] * (n - 1), WideBlock
            )
            for i in range(3)
        }
        tail = {"bn1": nn.BatchNorm2d(widths[-1]), "act1": nn.ReLU()}
        stem = {"conv1": conv3x3(in_chans, 16)}
        super().__init__(
            stem, stages, tail, channels=widths[1:], strides=[1, 2, 4], in_chans=in_chans, **head
        )


default_cfgs = cifar_cfgs(
    *(f"cifar_wrn{n}" for n in ("16_1", "16_2", "16_4", "28_10", "40_1", "40_2"))
)


@register_model
def cifar_wrn16_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn16_1", pretrained, depth=16, width=1, **kwargs)


@register_model
def cifar_wrn16_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn16_2", pretrained, depth=16, width=2, **kwargs)


@register_model
def cifar_wrn16_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn16_4", pretrained, depth=16, width=4, **kwargs)


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn28_10", pretrained, depth=28, width=10, **kwargs)


@register_model
def cifar_wrn40_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn40_1", pretrained, depth=40, width=1, **kwargs)


@register_model
def cifar_wrn40_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    return create(WideResNet, "cifar_wrn40_2", pretrained, depth=40, width=2, **kwargs)
