"""VGG with BatchNorm for CIFAR (Simonyan, Zisserman 2015, arXiv 1409.1556).

Blocks: five, of 64, 128, 256, 512, 512 channels, as in the distillation papers (Tian et al. 2020,
arXiv 1910.10699). They are named block0 to block4. block1, block2 and block3 start with a 2x2 max
pool, so that a block is one stage and a 32x32 image ends as 4x4.

Differs from the paper: one linear layer on 512 pooled features (the paper has three); no pool
between block3 and block4, at any image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import nn

from kdtoolkit.models.cifar import CifarNet, cifar_cfgs, create_network

WIDTHS = [64, 128, 256, 512, 512]


def make_block(inputs: int, width: int, convs: int, pool: bool) -> nn.Sequential:
    """Make a block of 3x3 convolutions, each with BatchNorm and ReLU.

    Args:
        inputs: Input channels.
        width: Output channels of every convolution.
        convs: Number of convolutions.
        pool: Whether the block starts with a 2x2 max pool.

    Returns:
        The layers, in order.
    """
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    for i in range(convs):
        source = inputs if i == 0 else width
        layers += [nn.Conv2d(source, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class VGG(CifarNet):
    """VGG with BatchNorm in five blocks.

    Args:
        convs: Number of convolutions in each of the five blocks.
        in_chans: Channels of the images.
        **head: `num_classes`, `global_pool` and `drop_rate`, see `CifarNet`.
    """

    def __init__(self, convs: Sequence[int], in_chans: int = 3, **head: Any) -> None:
        sources = [in_chans, *WIDTHS[:-1]]
        stages = {
            f"block{i}": make_block(source, width, count, pool=i in (1, 2, 3))
            for i, (source, width, count) in enumerate(zip(sources, WIDTHS, convs, strict=True))
        }
        super().__init__(
            {}, stages, {}, channels=WIDTHS, strides=[1, 2, 4, 8, 8], in_chans=in_chans, **head
        )


default_cfgs = cifar_cfgs(*(f"cifar_vgg{n}" for n in (8, 11, 13, 16, 19)), first_conv="block0.0")


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-8 with BatchNorm, of the distillation papers (Tian et al. 2020, arXiv 1910.10699)."""
    return create_network(VGG, "cifar_vgg8", pretrained, stages=5, convs=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-11 with BatchNorm (Simonyan and Zisserman 2015, arXiv 1409.1556)."""
    return create_network(VGG, "cifar_vgg11", pretrained, stages=5, convs=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-13 with BatchNorm (Simonyan and Zisserman 2015, arXiv 1409.1556)."""
    return create_network(VGG, "cifar_vgg13", pretrained, stages=5, convs=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-16 with BatchNorm (Simonyan and Zisserman 2015, arXiv 1409.1556)."""
    return create_network(VGG, "cifar_vgg16", pretrained, stages=5, convs=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> VGG:
    """VGG-19 with BatchNorm (Simonyan and Zisserman 2015, arXiv 1409.1556)."""
    return create_network(VGG, "cifar_vgg19", pretrained, stages=5, convs=(2, 2, 4, 4, 4), **kwargs)
