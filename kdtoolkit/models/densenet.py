"""Densely connected networks, plain (Huang, Liu, van der Maaten, Weinberger 2017, arXiv 1608.06993, section 3).

Depth    3n + 4: three dense blocks of n layers, each layer (BatchNorm, ReLU, 3x3) adds `growth` channels to 16.
Stages   a dense block with the transition in front of it (BatchNorm, ReLU, 1x1, 2x2 average pool); strides 1, 2, 4.
Differs  no dropout. No bottleneck and no compression, as in the paper's "DenseNet" rows.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from kdtoolkit.models.cifar import CifarNet, blocks_per_stage, cifar_cfgs, conv1x1, conv3x3, create


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn, self.act, self.conv = nn.BatchNorm2d(inputs), nn.ReLU(), conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.act(self.bn(x)))], 1)  # (B, inputs + growth, H, W)


def transition(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(), conv1x1(width, width), nn.AvgPool2d(2)]


class DenseNet(CifarNet):
    def __init__(self, depth: int, growth: int, in_chans: int = 3, **head: Any) -> None:
        n = blocks_per_stage(depth, 4, 1, "DenseNet")
        channels = [16 + growth * n * (i + 1) for i in range(3)]
        stages = {}
        for i, start in enumerate([16, *channels[:2]]):
            layers = [DenseLayer(start + growth * k, growth) for k in range(n)]
            stages[f"block{i + 1}"] = nn.Sequential(*(transition(start) if i else []), *layers)
        tail = {"bn1": nn.BatchNorm2d(channels[-1]), "act1": nn.ReLU()}
        stem = {"conv1": conv3x3(in_chans, 16)}
        super().__init__(
            stem, stages, tail, channels=channels, strides=[1, 2, 4], in_chans=in_chans, **head
        )


default_cfgs = cifar_cfgs("cifar_densenet40_12", "cifar_densenet100_12")


@register_model
def cifar_densenet40_12(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    return create(DenseNet, "cifar_densenet40_12", pretrained, depth=40, growth=12, **kwargs)


@register_model
def cifar_densenet100_12(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    return create(DenseNet, "cifar_densenet100_12", pretrained, depth=100, growth=12, **kwargs)
