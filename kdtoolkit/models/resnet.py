"""Residual networks for CIFAR (He, Zhang, Ren, Sun 2016, arXiv 1512.03385, section 4.2).

Depth: 6n + 2, with n blocks in each of three stages of 16, 32, 64 channels at strides 1, 2, 4.

Shortcut where the shape changes: "A" takes every stride-th pixel and pads the channels with zeros,
half on each side, without parameters (the CIFAR networks of the paper); "B" is a 1x1 convolution
and BatchNorm (the distillation papers).

Others: resnet8x4 and resnet32x4 have a stem of 32 and stages of 64, 128, 256 channels (Tian et al.
2020, arXiv 1910.10699). wrn20_8 is the "WRN-20-8" of OKDDip, PCL and DKEL. Depth 20 is not a wide
ResNet's 6n + 4: the public code of OKDDip (Chen et al. 2020, arXiv 1912.00350) has two bottleneck
blocks a stage with 64, 128, 256 output channels, whose 3x3 convolutions are 128, 256, 512 wide
(8 times 16, 32, 64). It is a ResNet, so it is defined here.

Differs from the paper: the default shortcut is "B".
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


class PadShortcut(nn.Module):
    """Shortcut A: every stride-th pixel, and zero channels on both sides.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Step between the pixels that are kept.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.low = (width - inputs) // 2
        self.high = width - inputs - self.low

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.low, self.high))


def make_shortcut(inputs: int, width: int, stride: int, kind: str) -> nn.Module:
    """Make the shortcut of a block.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the block.
        kind: "A" or "B", see the top of the file.

    Returns:
        The identity where the shape is kept, else a shortcut of this kind.

    Raises:
        ValueError: If `kind` is another.
    """
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
    """Two 3x3 convolutions with BatchNorm, plus the shortcut, then ReLU.

    Attributes:
        layers: Layers that the block counts in the depth of the network.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the first convolution.
        shortcut: "A" or "B", see `make_shortcut`.
    """

    layers = 2

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class WideBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, plus the shortcut, then ReLU.

    The 3x3 convolution is twice as wide as the output (8 x 16 against 4 x 16).

    Attributes:
        layers: Layers that the block counts in the depth of the network.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the 3x3 convolution.
        shortcut: "A" or "B", see `make_shortcut`.
    """

    layers = 3

    def __init__(self, inputs: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        middle = 2 * width
        self.conv1 = conv1x1(inputs, middle)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv3x3(middle, middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv1x1(middle, width)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample = make_shortcut(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(CifarNet):
    """A ResNet with three stages.

    Args:
        depth: Number of layers, 6n + 2 with `BasicBlock`, 9n + 2 with `WideBottleneck`.
        widths: Channels of the stem and of the three stages.
        block: Class of the blocks.
        shortcut: "A" or "B", see `make_shortcut`.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        block: type[BasicBlock] | type[WideBottleneck] = BasicBlock,
        shortcut: str = "B",
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        num_blocks = blocks_per_stage(depth, 2, block.layers, "ResNet")
        first_strides = [1, 2, 2]  # of the first block of each stage
        stages = {}
        for i, stride in enumerate(first_strides):
            strides = [stride] + [1] * (num_blocks - 1)
            outputs = [widths[i + 1]] * num_blocks
            stages[f"layer{i + 1}"] = make_stage(
                widths[i], outputs, strides, block, shortcut=shortcut
            )
        stem = {
            "conv1": conv3x3(in_chans, widths[0]),
            "bn1": nn.BatchNorm2d(widths[0]),
            "act1": nn.ReLU(),
        }
        super().__init__(
            stem, stages, {}, channels=widths[1:], strides=[1, 2, 4], in_chans=in_chans, **head
        )
        self.kd_model_args = {"shortcut": shortcut}


default_cfgs = cifar_cfgs(
    *(f"cifar_resnet{n}" for n in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")),
    "cifar_wrn20_8",
)
WIDE4 = (32, 64, 128, 256)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-8 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet8", pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-14 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet14", pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-20 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-32 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet32", pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-44 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet44", pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-56 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet56", pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-110 for CIFAR (He et al. 2016, arXiv 1512.03385)."""
    return create_network(ResNet, "cifar_resnet110", pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-8 with 4 times the channels (Tian et al. 2020, arXiv 1910.10699)."""
    return create_network(ResNet, "cifar_resnet8x4", pretrained, depth=8, widths=WIDE4, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-32 with 4 times the channels (Tian et al. 2020, arXiv 1910.10699)."""
    return create_network(ResNet, "cifar_resnet32x4", pretrained, depth=32, widths=WIDE4, **kwargs)


@register_model
def cifar_wrn20_8(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The WRN-20-8 of OKDDip (Chen et al. 2020, arXiv 1912.00350): a ResNet of wide bottlenecks."""
    shape: dict[str, Any] = {"depth": 20, "widths": (16, 64, 128, 256), "block": WideBottleneck}
    return create_network(ResNet, "cifar_wrn20_8", pretrained, **shape, **kwargs)
