"""ShuffleNet for CIFAR: v1 (Zhang et al. 2018, arXiv 1707.01083) and v2 (Ma et al. 2018, arXiv 1807.11164).

v1       3 groups, stages of 240, 480, 960 channels and 4, 8, 4 units.
v2       width 1, stages of 116, 232, 464 channels and 4, 8, 4 units, then a 1x1 to 1024.
Differs  the stem is a 1x1 convolution to 24 channels without pooling, and v1 has a ReLU after the depthwise
         convolution: both as in the distillation papers (Tian et al. 2020, arXiv 1910.10699). Strides 2, 4, 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import CifarNet, chain, cifar_cfgs, conv1x1, create

UNITS = [4, 8, 4]


def depthwise(width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel k of group g goes to place k * groups + g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class UnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise, grouped 1x1; stride 2 joins the pooled input instead of adding it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.groups = (
            stride,
            1 if inputs == 24 else 3,
        )  # the first unit's input is too thin to group
        outputs = width - inputs if stride == 2 else width
        middle = outputs // 4
        self.conv1, self.bn1 = conv1x1(inputs, middle, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = depthwise(middle, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv1x1(middle, outputs, groups=3), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(y + x)


def pointwise(inputs: int, width: int) -> list[nn.Module]:
    return [conv1x1(inputs, width), nn.BatchNorm2d(width), nn.ReLU()]


class UnitV2(nn.Module):
    """Two branches, joined and shuffled; stride 1 leaves the first half of the channels as it is."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        half = width // 2
        source = inputs if stride == 2 else half
        self.split = stride == 1
        self.right = nn.Sequential(
            *pointwise(source, half),
            depthwise(half, stride),
            nn.BatchNorm2d(half),
            *pointwise(half, half),
        )
        self.left = (
            nn.Identity()
            if self.split
            else nn.Sequential(
                depthwise(inputs, stride), nn.BatchNorm2d(inputs), *pointwise(inputs, half)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.split else (x, x)
        return shuffle(torch.cat([self.left(left), self.right(right)], 1), 2)


class ShuffleNet(CifarNet):
    """`last`: channels of a final 1x1 convolution, None without."""

    def __init__(
        self,
        unit: type[UnitV1] | type[UnitV2],
        channels: tuple[int, int, int],
        last: int | None = None,
        in_chans: int = 3,
        **head: Any,
    ) -> None:
        stem = {"conv1": conv1x1(in_chans, 24), "bn1": nn.BatchNorm2d(24), "act1": nn.ReLU()}
        stages = {
            f"layer{i + 1}": chain(source, [width] * n, [2] + [1] * (n - 1), unit)
            for i, (source, width, n) in enumerate(
                zip((24, *channels[:2]), channels, UNITS, strict=True)
            )
        }
        tail = (
            {}
            if last is None
            else dict(zip(("conv2", "bn2", "act2"), pointwise(channels[-1], last), strict=True))
        )
        shape: dict[str, Any] = dict(channels=list(channels), strides=[2, 4, 8], num_features=last)
        super().__init__(stem, stages, tail, in_chans=in_chans, **shape, **head)


default_cfgs = cifar_cfgs("cifar_shufflenetv1", "cifar_shufflenetv2")


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    return create(
        ShuffleNet,
        "cifar_shufflenetv1",
        pretrained,
        unit=UnitV1,
        channels=(240, 480, 960),
        **kwargs,
    )


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> ShuffleNet:
    shape: dict[str, Any] = dict(unit=UnitV2, channels=(116, 232, 464), last=1024)
    return create(ShuffleNet, "cifar_shufflenetv2", pretrained, **shape, **kwargs)
