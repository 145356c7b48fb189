"""Wide residual networks (Zagoruyko, Komodakis 2016, arXiv 1605.07146).

Depth: 6n + 4, with n pre-activation blocks in each of three stages of 16k, 32k, 64k channels at
strides 1, 2, 4.

Stages: they end before the BatchNorm and ReLU that follow them, so their outputs are raw sums.

Differs from the paper: no dropout inside the blocks. "WRN-20-8" is no wide ResNet: see resnet.py.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import (
    CifarNet,
    blocks_per_stage,
    cifar_cfgs,
    conv1x1,
    conv3x3,
    create_network,
    make_stage,
)


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, plus a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution that starts after the first ReLU.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        changes_shape = inputs != width or stride != 1
        self.shortcut = conv1x1(inputs, width, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(y)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return shortcut + residual


class WideResNet(CifarNet):
    """A wide ResNet with three stages.

    Args:
        depth: Number of layers, 6n + 4.
        width: Widening factor k.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(self, depth: int, width: int, in_chans: int = 3, **head: Any) -> None:
        num_blocks = blocks_per_stage(depth, 4, 2, "wide ResNet")
        widths = [16, 16 * width, 32 * width, 64 * width]
        first_strides = [1, 2, 2]  # of the first block of each stage
        stages = {}
        for i, stride in enumerate(first_strides):
            strides = [stride] + [1] * (num_blocks - 1)
            outputs = [widths[i + 1]] * num_blocks
            stages[f"block{i + 1}"] = make_stage(widths[i], outputs, strides, WideBlock)
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
    """WRN-16-1 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn16_1", pretrained, depth=16, width=1, **kwargs)


@register_model
def cifar_wrn16_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-16-2 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn16_2", pretrained, depth=16, width=2, **kwargs)


@register_model
def cifar_wrn16_4(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-16-4 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn16_4", pretrained, depth=16, width=4, **kwargs)


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn28_10", pretrained, depth=28, width=10, **kwargs)


@register_model
def cifar_wrn40_1(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-40-1 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn40_1", pretrained, depth=40, width=1, **kwargs)


@register_model
def cifar_wrn40_2(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-40-2 (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return create_network(WideResNet, "cifar_wrn40_2", pretrained, depth=40, width=2, **kwargs)
