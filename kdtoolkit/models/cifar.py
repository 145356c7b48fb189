"""What the CIFAR networks share: stem, stages and tail in a row, a pooled linear head, and the entry into timm.

Each stage is one child module that takes the previous stage's output alone, so it can be run, hooked or replaced
alone. Nothing acts in place on a stage's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

MEAN, STD = (
    (0.5071, 0.4867, 0.4408),
    (0.2675, 0.2565, 0.2761),
)  # CIFAR-100 training set, pixels in [0, 1]


class CifarNet(nn.Module):
    """stem -> stages -> tail -> pool -> fc.

    stem, stages, tail  modules by name, called in this order; the names are the state dict's
    channels, strides   of every stage's output; a stride counts input pixels a position
    """

    def __init__(
        self,
        stem: Mapping[str, nn.Module],
        stages: Mapping[str, nn.Module],
        tail: Mapping[str, nn.Module],
        *,
        channels: list[int],
        strides: list[int],
        num_features: int | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.global_pool: Any
        for name, module in (*stem.items(), *stages.items(), *tail.items()):
            self.add_module(name, module)
        self.body = (*stem, *stages, *tail)
        self.feature_info = [
            {"num_chs": c, "reduction": r, "module": name}
            for c, r, name in zip(channels, strides, stages, strict=True)
        ]
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = num_features or channels[-1]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, randomly initialised `fc`; 0 classes leave the pooled features, `global_pool=""` the map."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        old = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.fc = fc.to(device=old.device, dtype=old.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        for name in self.body:
            x = getattr(self, name)(x)
        return x  # (B, num_features, H, W)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)  # (B, head_hidden_size)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))  # (B, num_classes)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)


def chain(
    inputs: int, widths: list[int], strides: list[int], block: Any, **options: Any
) -> nn.Sequential:
    """One stage: a block for each width and stride, `block(inputs, width, stride, **options)`."""
    sources = [inputs, *widths[:-1]]
    return nn.Sequential(
        *(block(i, w, s, **options) for i, w, s in zip(sources, widths, strides, strict=True))
    )


def blocks_per_stage(depth: int, extra: int, per_block: int, what: str) -> int:
    """Blocks in each of three stages of a network with `depth` layers, `extra` of them outside the stages."""
    count, rest = divmod(depth - extra, 3 * per_block)
    if rest or count < 1:
        raise ValueError(
            f"depth {depth}: a {what} has {3 * per_block}n + {extra} layers, {3 * per_block + extra} or more"
        )
    return count


def cifar_cfgs(*names: str, first_conv: str = "conv1") -> Any:
    """timm's `default_cfgs`: 32 x 32 input, CIFAR-100 statistics, no published weights."""
    cfg = dict(
        num_classes=100,
        input_size=(3, 32, 32),
        mean=MEAN,
        std=STD,
        crop_pct=1.0,
        interpolation="bicubic",
    )
    return generate_default_cfgs(
        {name: {**cfg, "first_conv": first_conv, "classifier": "fc"} for name in names}
    )


def create(
    net: type[CifarNet], variant: str, pretrained: bool, stages: int = 3, **kwargs: Any
) -> Any:
    features = {"out_indices": tuple(range(stages))}
    return build_model_with_cfg(net, variant, pretrained, feature_cfg=features, **kwargs)
