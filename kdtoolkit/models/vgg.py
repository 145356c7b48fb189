"""VGG with BatchNorm for CIFAR (Simonyan, Zisserman 2015, arXiv 1409.1556; Tian et al. 2020, arXiv 1910.10699).

Blocks   five, of 64, 128, 256, 512, 512 channels; blocks 1, 2, 3 start with a 2x2 max pool, so that a block is one
         stage and a 32x32 image ends as 4x4.
Differs  one linear layer on 512 pooled features (the paper has three); no pool between blocks 3 and 4, at any size.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import nn

from kdtoolkit.models.cifar import CifarNet, cifar_cfgs, create

WIDTHS = [64, 128, 256, 512, 512]


def block(inputs: int, width: int, convs: int, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = [] if not pool else [nn.MaxPool2d(2)]
    for i in range(convs):
        layers += [
            nn.Conv2d(inputs if i == 0 else width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class VGG(CifarNet):
    """`convs`: convolutions in each of the five blocks."""

    def __init__(self, convs: tuple[int, ...], in_chans: int = 3, **head: Any) -> None:
        sources = [in_chans, *WIDTHS[:-1]]
        stages = {
            f"block{i}": block(source, width, n, pool=i in (1, 2, 3))
            for i, (source, width, n) in enumerate(zip(sources, WIDTHS, convs, strict=True))
        }
        super().__init__(
            {}, stages, {}, channels=WIDTHS, strides=[1, 2, 4, 8, 8], in_chans=in_chans, **head
        )


default_cfgs = cifar_cfgs(*(f"cifar_vgg{n}" for n in (8, 11, 13, 16, 19)), first_conv="block0.0")


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> VGG:
    return create(VGG, "cifar_vgg8", pretrained, stages=5, convs=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> VGG:
    return create(VGG, "cifar_vgg11", pretrained, stages=5, convs=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> VGG:
    return create(VGG, "cifar_vgg13", pretrained, stages=5, convs=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> VGG:
    return create(VGG, "cifar_vgg16", pretrained, stages=5, convs=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> VGG:
    return create(VGG, "cifar_vgg19", pretrained, stages=5, convs=(2, 2, 4, 4, 4), **kwargs)
