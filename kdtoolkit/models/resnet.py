"""Residual networks for CIFAR (He, Zhang, Ren, Sun 2016, arXiv 1512.03385, section 4.2).

Depth    6n + 2, n blocks in each of three stages of 16, 32, 64 channels at strides 1, 2, 4.
Shortcut where the shape changes: "A" takes every stride-th pixel and pads channels with zeros, half on each side, no
         parameters (the paper's CIFAR networks); "B" is a 1x1 convolution and BatchNorm (the distillation papers).
Others   resnet8x4, resnet32x4: stem 32, stages 64, 128, 256 (Tian et al. 2020, arXiv 1910.10699).
         wrn20_8: the "WRN-20-8" of OKDDip, PCL and DKEL. Depth 20 is not a wide ResNet's 6n + 4; OKDDip's public code
         (Chen et al. 2020, arXiv 1912.00350) has two bottleneck blocks a stage, 64, 128, 256 channels out, their
         3x3 convolution 128, 256, 512 wide (8 times 16, 32, 64). It is a ResNet, so it stands here.
Differs  default shortcut "B".
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


class PadShortcut(nn.Module):
    """Shortcut A: subsample, then zero channels on both sides."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.low = stride, (width - inputs) // 2
        self.high = width - inputs - self.low

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.low, self.high))


def make_shortcut(inputs: int, width: int, stride: int, kind: str) -> nn.Module:
    if kind not in ("A", "B"):
        raise ValueError(
            f'shortcut={kind!r}: expected "A" (zero padding) or "B" (1x1 convolution and BatchNorm)'
        )
    if inputs == width and stride == 1:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(inputs, width, stride)
    return nn.Sequential(conv1x1(inputs, width, stride), nn.BatchNorm2d(width))


class BasicBlock(nn.Module):
    layers = 2

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class WideBottleneck(nn.Module):
    """1x1, 3x3, 1x1; the 3x3 is twice as wide as the output (8 x 16 against 4 x 16)."""

    layers = 3

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        middle = 2 * width
        self.conv1, self.bn1 = conv1x1(inputs, middle), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv3x3(middle, middle, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv1x1(middle, width), nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(CifarNet):
    """`widths`: channels of the stem and of the three stages."""

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        block: type[BasicBlock] | type[WideBottleneck] = BasicBlock,
        shortcut: str = "B",
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        n = blocks_per_stage(depth, 2, block.layers, "ResNet")
        stem, *channels = widths
        strides = [1, 2, 2]  # of each stage's first block
        stages = {
            f"layer{i + 1}": chain(
                widths[i], [width] * n, [strides[i]] + [1] * (n - 1), block, shortcut=shortcut
            )
            for i, width in enumerate(channels)
        }
        first = {"conv1": conv3x3(in_chans, stem), "bn1": nn.BatchNorm2d(stem), "act1": nn.ReLU()}
        super().__init__(
            first, stages, {}, channels=channels, strides=[1, 2, 4], in_chans=in_chans, **head
        )
        self.kd_model_args = {"shortcut": shortcut}


default_cfgs = cifar_cfgs(
    *(f"cifar_resnet{n}" for n in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")),
    "cifar_wrn20_8",
)
WIDE4 = (32, 64, 128, 256)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet8", pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet14", pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet32", pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet44", pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet56", pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet110", pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet8x4", pretrained, depth=8, widths=WIDE4, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return create(ResNet, "cifar_resnet32x4", pretrained, depth=32, widths=WIDE4, **kwargs)


@register_model
def cifar_wrn20_8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    shape: dict[str, Any] = dict(depth=20, widths=(16, 64, 128, 256), block=WideBottleneck)
    return create(ResNet, "cifar_wrn20_8", pretrained, **shape, **kwargs)
