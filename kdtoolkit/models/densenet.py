"""Plain DenseNets (Huang, Liu, van der Maaten, Weinberger 2017, arXiv 1608.06993, section 3).

Depth: 3n + 4: three dense blocks of n layers; each layer (BatchNorm, ReLU, 3x3) adds
`growth` channels to the first 16.

Stages: a dense block with the transition in front of it (BatchNorm, ReLU, 1x1, 2x2 average pool);
strides 1, 2, 4.

Differs from the paper: no dropout. No bottleneck and no compression, as in the "DenseNet" rows of
the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import (
    CifarNet,
    blocks_per_stage,
    cifar_cfgs,
    conv1x1,
    conv3x3,
    create_network,
)

STEM_WIDTH = 16


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose output is concatenated to the input.

    Args:
        inputs: Input channels.
        growth: Channels that are added.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.act = nn.ReLU()
        self.conv = conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, inputs + growth, H, W)."""
        return torch.cat([x, self.conv(self.act(self.bn(x)))], 1)


def transition(width: int) -> list[nn.Module]:
    """Make the layers between two dense blocks: half the resolution, as many channels.

    Args:
        width: Channels that go in and come out.

    Returns:
        BatchNorm, ReLU, 1x1 convolution and 2x2 average pooling.
    """
    return [nn.BatchNorm2d(width), nn.ReLU(), conv1x1(width, width), nn.AvgPool2d(2)]


class DenseNet(CifarNet):
    """A plain DenseNet with three dense blocks.

    Args:
        depth: Number of layers, 3n + 4.
        growth: Channels that each layer adds.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(self, depth: int, growth: int, in_chans: int = 3, **head: Any) -> None:
        num_layers = blocks_per_stage(depth, 4, 1, "DenseNet")
        channels = [STEM_WIDTH + growth * num_layers * (i + 1) for i in range(3)]
        stages = {}
        for i, start in enumerate([STEM_WIDTH, *channels[:2]]):
            layers = [DenseLayer(start + growth * k, growth) for k in range(num_layers)]
            before = transition(start) if i > 0 else []
            stages[f"block{i + 1}"] = nn.Sequential(*before, *layers)
        tail = {"bn1": nn.BatchNorm2d(channels[-1]), "act1": nn.ReLU()}
        stem = {"conv1": conv3x3(in_chans, STEM_WIDTH)}
        super().__init__(
            stem, stages, tail, channels=channels, strides=[1, 2, 4], in_chans=in_chans, **head
        )


default_cfgs = cifar_cfgs("cifar_densenet40_12", "cifar_densenet100_12")


@register_model
def cifar_densenet40_12(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """DenseNet-40, growth 12 (Huang et al. 2017, arXiv 1608.06993)."""
    return create_network(
        DenseNet, "cifar_densenet40_12", pretrained, depth=40, growth=12, **kwargs
    )


@register_model
def cifar_densenet100_12(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """DenseNet-100, growth 12 (Huang et al. 2017, arXiv 1608.06993)."""
    return create_network(
        DenseNet, "cifar_densenet100_12", pretrained, depth=100, growth=12, **kwargs
    )
