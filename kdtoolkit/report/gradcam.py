"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): where a network looks for a class.

The weight of a channel is the gradient of the class's logit with respect to it, averaged over
positions. The map is ReLU(sum over channels of weight * activation), upsampled to the image and
divided by its maximum.

Differs: the layer may also give tokens or channels-last maps; the paper has convolutions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.model_inputs import normalisation
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.report.gradcam_layers import find_last_map, stage_channels, to_feature_map

Target = int | Sequence[int] | Tensor
MeanStd = tuple[Sequence[float], Sequence[float]]


class NoFeatureMap(ValueError):
    """A layer has no output that can be laid out as a feature map."""


def gradcam(
    model: nn.Module,
    x: Tensor,
    *,
    target: Target | None = None,
    layer: str | nn.Module | None = None,
    mean_std: MeanStd | None = None,
) -> Tensor:
    """Compute Grad-CAM maps of a network.

    It runs in eval mode. Modes, gradients, `requires_grad` flags and hooks of the model are left as
    they were.

    Args:
        model: The network, images to logits (B, C).
        x: Images (B, C, H, W) in [0, 1], not normalised. They are normalised here, and resized
            where the model's size is fixed.
        target: Class id for all images, or one each, (B,); by default the class with the highest
            logit.
        layer: Module or its name. By default the last stage of `model.feature_info` that has more
            than one position and whose positions reach the logits (the last block of a ViT that
            reads its class token only does not); without `feature_info` the last module whose
            output is 4-D.
        mean_std: Mean and standard deviation, one number a channel; by default those of the model's
            `pretrained_cfg`. A model without one gets x as it is.

    Returns:
        Maps (B, H, W) in [0, 1] at the resolution of x; 0 everywhere where no activation raises the
        logit of the class.

    Raises:
        ValueError: If x holds no images, the layer or the target does not exist, or no layer gives
            a feature map.

    Example:
        >>> import timm, torch
        >>> from kdtoolkit.report import gradcam
        >>> gradcam(timm.create_model("resnet10t"), torch.rand(2, 3, 64, 64), target=3).shape
        torch.Size([2, 64, 64])
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and type {x.dtype}: "
            "expected float images (B, C, H, W) in [0, 1]"
        )
    image = normalise(model, _like_parameters(x.detach(), model), mean_std)
    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        image = image.clone()  # no inference tensor, if the caller was in inference mode
        feature, gradient = _feature_and_gradient(model, image, target, layer)
    weight = gradient.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    cam = (weight * feature).sum(1, keepdim=True).relu()  # (B, 1, h, w)
    cam = F.interpolate(cam, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax((1, 2), keepdim=True)
    scaled = cam / peak.clamp_min(torch.finfo(cam.dtype).tiny)
    return torch.where(peak > 0, scaled, torch.zeros_like(cam))


def normalise(model: nn.Module, x: Tensor, mean_std: MeanStd | None = None) -> Tensor:
    """Turn images into what a model is trained on.

    Args:
        model: The network.
        x: Images (B, C, H, W) in [0, 1]; they are resized where the model's size is fixed.
        mean_std: Mean and standard deviation, one number a channel; by default those of the model's
            `pretrained_cfg`, without them only the size is changed.

    Raises:
        ValueError: If there is not one number for each channel.
    """
    own = Preprocess.from_model(model, (x.shape[2], x.shape[3]))
    x = Preprocess(size=own.size, channels=own.channels)(x)
    mean_std = normalisation(model) if mean_std is None else mean_std
    if mean_std is None:
        return x
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).flatten() for v in mean_std)
    channels = x.shape[1]
    if mean.numel() not in (1, channels) or std.numel() not in (1, channels):
        raise ValueError(
            f"mean of {mean.numel()} and std of {std.numel()} channels, images of {channels}: "
            "pass mean_std=(mean, std) with one number per channel"
        )
    return (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside a block; the mode of each module is restored.

    Args:
        model: The model; it is changed in place.

    Yields:
        Nothing; the block runs. The modes are restored after an error too.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> tuple[list[float], list[int]]:
    """Predict the class of each image, in eval mode.

    Args:
        model: The network, images to logits (B, C).
        images: Images (B, C, H, W) in [0, 1].

    Returns:
        Probability and id of the class with the highest logit, for each image.
    """
    with eval_mode(model):
        returned = model(normalise(model, _like_parameters(images, model)))
        logits = check_logits(model, returned)
    probabilities, classes = logits.float().softmax(1).max(1)
    return probabilities.tolist(), classes.tolist()


def _like_parameters(x: Tensor, model: nn.Module) -> Tensor:
    """Images on the device and of the type of the model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    return x.to(like.device, like.dtype)


def _feature_and_gradient(
    model: nn.Module, image: Tensor, target: Target | None, layer: str | nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Activation and gradient, (B, C, h, w) float, of the given layer or of the best default."""
    channels = stage_channels(model)
    if layer is not None:
        name = _layer_name(model, layer)
        return _capture(model, name, image, target, channels.get(name))
    candidates = [*reversed(channels), *find_last_map(model, image)]
    fallback = None
    for name in candidates:
        try:
            feature, gradient = _capture(model, name, image, target, channels.get(name))
        except NoFeatureMap:
            continue
        has_positions = feature[0, 0].numel() > 1
        if has_positions and gradient.any():
            return feature, gradient
        fallback = fallback or (feature, gradient)
    if fallback is None:
        raise ValueError(
            f"no layer of {type(model).__name__} gives a map or tokens; pass layer= the name of one"
        )
    return fallback


def _layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if module is layer or name == layer:
            return name
    children = ", ".join(name for name, _ in model.named_children())
    raise ValueError(
        f"layer {layer!r} is not a module of {type(model).__name__}; its children: {children}"
    )


def _capture(
    model: nn.Module, name: str, image: Tensor, target: Target | None, channels: int | None
) -> tuple[Tensor, Tensor]:
    """Activation and gradient, (B, C, h, w) float, of one layer."""
    outputs: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        outputs.append(output)
        # what comes next may write in place
        return output.clone() if isinstance(output, Tensor) else None

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        # the image requires a gradient so that frozen parameters do not stop it
        logits = check_logits(model, model(image.detach().requires_grad_()))
    finally:
        handle.remove()
    feature = _check_feature(name, outputs)
    score = logits.gather(1, _target_ids(target, logits)).sum()
    (gradient,) = torch.autograd.grad(score, feature, allow_unused=True)
    gradient = torch.zeros_like(feature) if gradient is None else gradient
    aspect = image.shape[2] / image.shape[3]
    return (
        to_feature_map(feature.detach().float(), model, channels, aspect),
        to_feature_map(gradient.detach().float(), model, channels, aspect),
    )


def _check_feature(name: str, outputs: Sequence[Any]) -> Tensor:
    """The last output of a layer, if it can be laid out as a feature map."""
    if not outputs:
        raise NoFeatureMap(
            f"layer {name!r} was never called (a container, or gradient checkpointing); "
            "pass one of its children"
        )
    feature = outputs[-1]
    if isinstance(feature, Tensor) and feature.ndim in (3, 4) and feature.requires_grad:
        return feature
    shown = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
    raise NoFeatureMap(
        f"layer {name!r} gives {shown}; "
        "expected a map (B, C, H, W), (B, H, W, C) or tokens (B, L, C)"
    )


def _target_ids(target: Target | None, logits: Tensor) -> Tensor:
    """Class ids, (B, 1) int64."""
    if target is None:
        return logits.argmax(1, keepdim=True)
    ids = torch.as_tensor(target, device=logits.device).long()
    count, classes = logits.shape
    has_count = ids.ndim == 0 or (ids.ndim == 1 and len(ids) == count)
    if not has_count or not 0 <= int(ids.min()) <= int(ids.max()) < classes:
        raise ValueError(
            f"target {target}: expected one class id, or {count} of them, from 0 to {classes - 1}"
        )
    return ids.expand(count)[:, None]
