"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): where a network looks for a class.

Weight of a channel   the gradient of the class's logit with respect to it, mean over positions
Map                   ReLU(sum over channels of weight * activation), upsampled to the image, divided by its maximum
Differs               the layer may also give tokens or channels-last maps; the paper has convolutions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.features.preprocess import Preprocess, normalisation
from kdtoolkit.types import Shape


def gradcam(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Sequence[int] | Tensor | None = None,
    layer: str | nn.Module | None = None,
    mean_std: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Tensor:
    """Grad-CAM maps (B, H, W) in [0, 1] at the resolution of x; 0 everywhere where nothing speaks for the class.

    x         (B, C, H, W) in [0, 1], not normalised; it is normalised here with `mean_std`, or with the model's own
              pretrained_cfg (a model without one gets x as it is), and resized where the model's size is fixed
    target    class id for all images or one each, (B,); by default the class that the model chooses
    layer     module or its name; by default the last stage of `model.feature_info` that has more than one position
              and whose positions reach the logits (the last block of a ViT that reads its class token only does not);
              without feature_info the last module whose output is 4-D

    Runs in eval mode. Modes, gradients, requires_grad flags and hooks of the model are left as found.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and type {x.dtype}: expected float images (B, C, H, W) in [0, 1]"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    image = prepare(model, x.detach().to(like.device, like.dtype), mean_std)
    with _eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        image = image.clone()  # not an inference tensor, if the caller was in inference mode
        feature, grad = _feature_and_grad(model, image, target, layer)
    cam = (grad.mean((2, 3), keepdim=True) * feature).sum(1, keepdim=True).relu()  # (B, 1, h, w)
    cam = F.interpolate(cam, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    peak = cam.amax((1, 2), keepdim=True)
    return torch.where(
        peak > 0, cam / peak.clamp_min(torch.finfo(cam.dtype).tiny), torch.zeros_like(cam)
    )


def prepare(
    model: nn.Module, x: Tensor, mean_std: tuple[Sequence[float], Sequence[float]] | None = None
) -> Tensor:
    """What the model is trained on: its own size where that is fixed; (x - mean) / std with the given numbers or those
    of its pretrained_cfg, without either as it is."""
    x = Preprocess(size=Preprocess.of(model, (x.shape[2], x.shape[3])).size)(x)
    mean_std = normalisation(model) if mean_std is None else mean_std
    if mean_std is None:
        return x
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).flatten() for v in mean_std)
    if mean.numel() not in (1, x.shape[1]) or std.numel() not in (1, x.shape[1]):
        raise ValueError(
            f"mean of {mean.numel()} and std of {std.numel()} channels, images of {x.shape[1]}: "
            "pass mean_std=(mean, std) with one number per channel"
        )
    return (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def _feature_and_grad(
    model: nn.Module, image: Tensor, target: Any, layer: str | nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Activation and gradient as float maps (B, C, h, w) of the chosen layer, or of the best default."""
    modules = dict(model.named_modules())
    if layer is not None:
        name = (
            layer
            if isinstance(layer, str)
            else next((n for n, m in modules.items() if m is layer), "?")
        )
        if name not in modules:
            names = ", ".join(n for n, _ in model.named_children())
            raise ValueError(
                f"layer {layer!r} is not a module of {type(model).__name__}; its children: {names}"
            )
        return _capture(model, modules[name], name, image, target, _channels(model).get(name))
    stages, backup = {n: c for n, c in _channels(model).items() if modules.get(n) is not None}, None
    for name in [*reversed(stages), *_last_maps(model, image)]:
        try:
            feature, grad = _capture(model, modules[name], name, image, target, stages.get(name))
        except _Unusable:
            continue
        if feature[0, 0].numel() > 1 and grad.any():
            return feature, grad
        backup = backup or (feature, grad)
    if backup is None:
        raise ValueError(
            f"no layer of {type(model).__name__} gives a map or tokens; pass layer= the name of one"
        )
    return backup


class _Unusable(ValueError):
    """A layer whose output is no map; also shown to the user who chose it."""


def _capture(
    model: nn.Module, module: nn.Module, name: str, image: Tensor, target: Any, channels: int | None
) -> tuple[Tensor, Tensor]:
    kept: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        kept.append(output)
        return (
            output.clone() if isinstance(output, Tensor) else None
        )  # what comes next may write in place

    handle = module.register_forward_hook(keep)
    try:
        logits = model(
            image.detach().requires_grad_()
        )  # so that frozen parameters do not stop the gradient
    finally:
        handle.remove()
    if not kept:
        raise _Unusable(
            f"layer {name!r} was never called (a container, or gradient checkpointing); pass one of its children"
        )
    feature = kept[-1]
    if not isinstance(feature, Tensor) or feature.ndim not in (3, 4) or not feature.requires_grad:
        shown = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise _Unusable(
            f"layer {name!r} gives {shown}; expected a map (B, C, H, W), (B, H, W, C) or tokens (B, L, C)"
        )
    score = logits.gather(1, _targets(target, logits)).sum()
    (grad,) = torch.autograd.grad(score, feature, allow_unused=True)
    grad = torch.zeros_like(feature) if grad is None else grad
    ratio = image.shape[2] / image.shape[3]
    return tuple(_as_map(t.detach().float(), channels, model, ratio) for t in (feature, grad))  # type: ignore[return-value]


def _targets(target: Any, logits: Tensor) -> Tensor:
    """(B, 1) class ids."""
    if target is None:
        return logits.argmax(1, keepdim=True)
    ids = torch.as_tensor(target, device=logits.device).long()
    if (
        ids.ndim > 1
        or (ids.ndim == 1 and len(ids) != len(logits))
        or not 0 <= int(ids.min()) <= int(ids.max()) < logits.shape[1]
    ):
        raise ValueError(
            f"target {target}: expected one class id, or {len(logits)} of them, from 0 to {logits.shape[1] - 1}"
        )
    return ids.expand(len(logits))[:, None]


def _as_map(t: Tensor, channels: int | None, model: nn.Module, ratio: float) -> Tensor:
    """Any layout -> (B, C, h, w); `channels`: how many the layer has, where known; ratio: image height / width."""
    if t.ndim == 4:
        last = t.shape[-1] == channels != t.shape[1] or (
            channels not in (t.shape[1], t.shape[-1])
            and t.shape[-1] > t.shape[1]
            and t.shape[1] / t.shape[2] == ratio
        )
        return t.permute(0, 3, 1, 2) if last else t
    prefix, (rows, columns) = _grid(t.shape[1], model, ratio)
    return t[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


def _grid(tokens: int, model: nn.Module, ratio: float) -> tuple[int, tuple[int, int]]:
    """Prefix tokens (class, register, distillation) and the grid of the rest: as the image's sides, where that fits."""
    hint = getattr(model, "num_prefix_tokens", 0)
    for prefix in dict.fromkeys(
        [hint, *range(min(tokens, 11))]
    ):  # num_prefix_tokens is only a hint
        rows = round(((tokens - prefix) * ratio) ** 0.5)
        if rows and rows * round(rows / ratio) == tokens - prefix:
            return prefix, (rows, round(rows / ratio))
    return hint, Shape((tokens, 1), prefix=hint).grid


def _channels(model: nn.Module) -> dict[str, int | None]:
    """Names of timm's stages -> channels, in order."""
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    rows = rows if isinstance(rows, list | tuple) else []
    return {r["module"]: r.get("num_chs") for r in rows if isinstance(r, dict) and r.get("module")}


def _last_maps(model: nn.Module, image: Tensor) -> list[str]:
    """The module that is left last with a 4-D output of more than one position, in a list; empty if there is none."""
    seen: list[str] = []

    def hook(name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if (
                isinstance(output, Tensor)
                and output.ndim == 4
                and output.shape[2] * output.shape[3] > 1
            ):
                seen.append(name)

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(image[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1:]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
