"""ShuffleNet for CIFAR: v1 (Zhang et al. 2018, arXiv 1707.01083), v2 (Ma et al. 2018, 1807.11164).

v1: 3 groups, stages of 240, 480, 960 channels and 4, 8, 4 units.

v2: width 1, stages of 116, 232, 464 channels and 4, 8, 4 units, then a 1x1 convolution to 1024.

Differs from the papers, as in the distillation papers (Tian et al. 2020, arXiv 1910.10699): the
stem is a 1x1 convolution to 24 channels without pooling, and v1 has a ReLU after the depthwise
convolution. The stages are at strides 2, 4, 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import CifarNet, cifar_cfgs, conv1x1, create_network, make_stage

UNITS = (4, 8, 4)  # of the three stages
STEM_WIDTH = 24


def depthwise(width: int, stride: int) -> nn.Conv2d:
    """Make a depthwise 3x3 convolution without bias.

    Args:
        width: Channels that go in and come out.
        stride: Step in pixels; 2 halves the resolution.

    Returns:
        The convolution.
    """
    return nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)


def pointwise(inputs: int, width: int) -> list[nn.Module]:
    """Make a 1x1 convolution with BatchNorm and ReLU.

    Args:
        inputs: Channels that go in.
        width: Channels that come out.

    Returns:
        The three layers, in this order.
    """
    return [conv1x1(inputs, width), nn.BatchNorm2d(width), nn.ReLU()]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Mix the channels of groups: channel k of group g goes to place k * groups + g.

    Args:
        x: Feature map, (B, C, H, W).
        groups: Number of groups, a divisor of C.

    Returns:
        The same channels in another order, (B, C, H, W).
    """
    return torch.unflatten(x, 1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1, plus the input.

    With stride 2 the pooled input is concatenated instead of added.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the depthwise convolution, 1 or 2.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.groups = 1 if inputs == STEM_WIDTH else 3  # the stem has too few channels for groups
        outputs = width - inputs if stride == 2 else width
        middle = outputs // 4
        self.conv1 = conv1x1(inputs, middle, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = depthwise(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv1x1(middle, outputs, groups=3)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(y + x)


class UnitV2(nn.Module):
    """Two branches, concatenated and shuffled.

    With stride 1 the first half of the channels is passed on as it is.

    Args:
        inputs: Input channels.
        width: Output channels.
        stride: Stride of the depthwise convolutions, 1 or 2.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        half = width // 2
        self.split = stride == 1
        self.right = nn.Sequential(
            *pointwise(half if self.split else inputs, half),
            depthwise(half, stride),
            nn.BatchNorm2d(half),
            *pointwise(half, half),
        )
        self.left: nn.Module = nn.Identity()
        if not self.split:
            self.left = nn.Sequential(
                depthwise(inputs, stride), nn.BatchNorm2d(inputs), *pointwise(inputs, half)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        left, right = x.chunk(2, 1) if self.split else (x, x)
        return shuffle(torch.cat([self.left(left), self.right(right)], 1), 2)


class ShuffleNet(CifarNet):
    """ShuffleNet with three stages.

    Args:
        unit: Class of the units.
        channels: Channels of the three stages.
        last: Channels of a final 1x1 convolution; None leaves it out.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(
        self,
        unit: type[UnitV1] | type[UnitV2],
        channels: tuple[int, int, int],
        last: int | None = None,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        stem = {
            "conv1": conv1x1(in_chans, STEM_WIDTH),
            "bn1": nn.BatchNorm2d(STEM_WIDTH),
            "act1": nn.ReLU(),
        }
        stages = {}
        source = STEM_WIDTH
        for i, (width, count) in enumerate(zip(channels, UNITS, strict=True)):
            strides = [2] + [1] * (count - 1)
            stages[f"layer{i + 1}"] = make_stage(source, [width] * count, strides, unit)
            source = width
        tail: dict[str, nn.Module] = {}
        if last is not None:
            tail = dict(zip(("conv2", "bn2", "act2"), pointwise(source, last), strict=True))
        super().__init__(
            stem,
            stages,
            tail,
            channels=channels,
            strides=[2, 4, 8],
            num_features=last,
            in_chans=in_chans,
            **head,
        )


default_cfgs = cifar_cfgs("cifar_shufflenetv1", "cifar_shufflenetv2")


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    """ShuffleNet v1 with 3 groups (Zhang et al. 2018, arXiv 1707.01083)."""
    shape: dict[str, Any] = {"unit": UnitV1, "channels": (240, 480, 960)}
    return create_network(ShuffleNet, "cifar_shufflenetv1", pretrained, **shape, **kwargs)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    """ShuffleNet v2 at width 1 (Ma et al. 2018, arXiv 1807.11164)."""
    shape: dict[str, Any] = {"unit": UnitV2, "channels": (116, 232, 464), "last": 1024}
    return create_network(ShuffleNet, "cifar_shufflenetv2", pretrained, **shape, **kwargs)
