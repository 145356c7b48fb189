"""What the CIFAR networks share: their layout, their linear head and their entry into timm.

Each stage is one child module that takes the output of the previous stage alone, so a stage can be
run, hooked or replaced alone. Nothing acts in place on the output of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

# Statistics of the CIFAR-100 training set, pixels in [0, 1]
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)


class CifarNet(nn.Module):
    """A network of the form stem, stages, tail, pooling, linear classifier `fc`.

    Attributes:
        feature_info: timm's table of stages: channels, stride and module name of each.
        num_features: Channels of the last feature map.
        head_hidden_size: Number of pooled features.
        num_classes: Number of classes; 0 without a classifier.

    Args:
        stem: Modules in front of the first stage, called in this order; the names are those of the
            state dict.
        stages: The stages by name, called in this order.
        tail: Modules behind the last stage, called in this order.
        channels: Channels of the output of each stage.
        strides: Input pixels per position of the output of each stage.
        num_features: Channels of the last feature map; None takes those of the last stage.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling: "avg", "max", "avgmax", "catavgmax"; "" for none.
        drop_rate: Dropout probability in front of the classifier, 0 to 1.
    """

    def __init__(
        self,
        stem: Mapping[str, nn.Module],
        stages: Mapping[str, nn.Module],
        tail: Mapping[str, nn.Module],
        *,
        channels: Sequence[int],
        strides: Sequence[int],
        num_features: int | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, module in (*stem.items(), *stages.items(), *tail.items()):
            self.add_module(name, module)
        self.body = (*stem, *stages, *tail)
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": name}
            for width, stride, name in zip(channels, strides, stages, strict=True)
        ]
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = num_features or channels[-1]
        self.global_pool: SelectAdaptivePool2d
        self.reset_classifier(num_classes, global_pool)
        _initialise_convolutions(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a randomly initialised one.

        Args:
            num_classes: Number of classes; with 0 the network returns pooled features.
            global_pool: timm's name of the pooling; "" returns the feature map (with 0 classes).
                None keeps the pooling.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        self.fc: nn.Module = fc.to(device=parameter.device, dtype=parameter.dtype)
        pool_factor: int = self.global_pool.feat_mult()  # type: ignore[no-untyped-call]
        self.head_hidden_size = self.num_features * pool_factor

    def get_classifier(self) -> nn.Module:
        """Return the classifier, an `nn.Identity` where there are no classes."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, (B, num_features, H, W)."""
        for name in self.body:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a feature map.

        Args:
            x: The last feature map, (B, num_features, H, W).
            pre_logits: Whether to stop at the pooled features.

        Returns:
            Logits (B, num_classes), or pooled features (B, head_hidden_size).
        """
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)  # (B, head_hidden_size)
        if pre_logits:
            return x
        logits: Tensor = self.fc(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def _initialise_convolutions(network: nn.Module) -> None:
    """He initialisation (He et al. 2015, arXiv 1502.01852), by fan-out; biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3x3 convolution with padding 1 and no bias.

    Args:
        inputs: Channels that go in.
        outputs: Channels that come out.
        stride: Step in pixels; 2 halves the resolution.

    Returns:
        The convolution.
    """
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Make a 1x1 convolution without bias.

    Args:
        inputs: Channels that go in.
        outputs: Channels that come out.
        stride: Step in pixels; 2 halves the resolution.
        groups: Number of groups of channels that are convolved apart.

    Returns:
        The convolution.
    """
    return nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)


def make_stage(
    inputs: int,
    widths: Sequence[int],
    strides: Sequence[int],
    block: Callable[..., nn.Module],
    **options: Any,
) -> nn.Sequential:
    """Make one stage, a sequence of blocks.

    Args:
        inputs: Channels of the input of the first block.
        widths: Output channels of each block.
        strides: Stride of each block.
        block: Makes a block; called as `block(inputs, width, stride, **options)`.
        **options: Further options of every block.

    Returns:
        The blocks, in order.
    """
    sources = [inputs, *widths[:-1]]
    return nn.Sequential(
        *(
            block(source, width, stride, **options)
            for source, width, stride in zip(sources, widths, strides, strict=True)
        )
    )


def blocks_per_stage(depth: int, extra: int, layers_per_block: int, family: str) -> int:
    """Compute the number of blocks in each of three stages.

    Args:
        depth: Number of layers of the network.
        extra: How many of them lie outside the stages.
        layers_per_block: Layers of one block.
        family: Name of the family, for the message.

    Returns:
        Blocks in each stage.

    Raises:
        ValueError: If no whole number of blocks gives this depth.
    """
    step = 3 * layers_per_block
    count, rest = divmod(depth - extra, step)
    if rest or count < 1:
        raise ValueError(
            f"depth {depth}: a {family} has {step}n + {extra} layers, {step + extra} or more"
        )
    return count


def cifar_cfgs(*names: str, first_conv: str = "conv1") -> Any:
    """Make `default_cfgs` for timm: 32 x 32 input, CIFAR-100 statistics, no published weights.

    Args:
        *names: Names of the architectures.
        first_conv: Module name of the convolution that takes the image.

    Returns:
        The table that timm looks for in the module of an architecture.
    """
    cfg = {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": first_conv,
        "classifier": "fc",
    }
    return generate_default_cfgs({name: dict(cfg) for name in names})


NetworkT = TypeVar("NetworkT", bound=CifarNet)


def create_network(
    network: type[NetworkT], variant: str, pretrained: bool, stages: int = 3, **kwargs: Any
) -> NetworkT:
    """Build a registered architecture as timm does.

    Args:
        network: Class of the network.
        variant: Registered name.
        pretrained: Whether to load weights from the `pretrained_cfg` or `local-dir:`.
        stages: Number of stages, for `features_only=True`.
        **kwargs: Arguments of the class, and timm's own.

    Returns:
        The network.
    """
    features = {"out_indices": tuple(range(stages))}
    return build_model_with_cfg(network, variant, pretrained, feature_cfg=features, **kwargs)
