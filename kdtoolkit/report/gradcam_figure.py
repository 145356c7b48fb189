"""Rows of Grad-CAM pictures: the images, then one row for each network (Figure 6 of the SRKD paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.report.gradcam import _eval_mode, gradcam, prepare
from kdtoolkit.report.plots import new_figure, save

RIGHT, WRONG, UNKNOWN = "#1A7F37", "#CF222E", "#333333"
MOST = 10  # images in a row


def gradcam_rows(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] = "gradcam.png",
) -> Path | None:
    """Draw up to 10 images (B, 3, H, W) in [0, 1], and each network's Grad-CAM of the class that it chooses over them.

    Below an image its label; below a network's picture the chosen class and its probability, green if it is the label,
    red if not. Returns the path of the PNG, or None when there is no model to draw.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) in [0, 1]")
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"{len(labels)} labels for {len(images)} images; pass one each, or labels=None"
        )
    if not models or not len(images):
        return None
    images = images.detach()[:MOST]
    truth = None if labels is None else [int(label) for label in labels[: len(images)]]
    shown, grey = _pixels(images), images.float().mean(1).cpu().clamp(0, 1).numpy()
    columns, rows = len(images), 1 + len(models)
    figure = new_figure(1.9 + 1.3 * columns, 0.5 + 1.55 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    _names(axes, ["image", *models])
    for i in range(columns):
        axes[0, i].imshow(shown[i], interpolation="nearest", vmin=0, vmax=1)
        if truth is not None:
            axes[0, i].set_xlabel(_class(truth[i], class_names), fontsize=9, color=UNKNOWN)
    for row, model in enumerate(models.values(), 1):
        maps, (sure, chosen) = gradcam(model, images).cpu().numpy(), _chosen(model, images)
        for i in range(columns):
            heat = _overlay(axes[row, i], grey[i], maps[i])
            color = UNKNOWN if truth is None else RIGHT if chosen[i] == truth[i] else WRONG
            text = f"{_class(chosen[i], class_names)}, {100 * sure[i]:.0f} %"
            axes[row, i].set_xlabel(text, fontsize=9, color=color)
    bar = figure.colorbar(heat, ax=axes, shrink=0.6, pad=0.015, ticks=[0, 1], aspect=24)
    bar.ax.set_yticklabels(["little", "much"], fontsize=8)
    bar.outline.set_visible(False)
    title = (
        "Grad-CAM: where each network looks for the class it chose" if columns > 3 else "Grad-CAM"
    )
    figure.suptitle(title, fontsize=11)
    save(figure, Path(path))
    return Path(path)


def _names(axes: Any, names: Sequence[str]) -> None:
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(
            name.replace(" ", "\n"), fontsize=10, rotation=0, ha="right", va="center", labelpad=8
        )


def _overlay(axis: Any, grey: Any, heat: Any) -> Any:
    """Heat map over the grey image; both cover the same square, whatever their resolution."""
    axis.imshow(0.25 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return axis.imshow(heat, cmap="jet", vmin=0, vmax=1, alpha=0.5, interpolation="bilinear")


def _pixels(images: Tensor) -> Any:
    return (
        images.float().cpu().clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    )  # (B, H, W, 3)


def _chosen(model: nn.Module, images: Tensor) -> tuple[list[float], list[int]]:
    """Probability and class id of each image's first choice."""
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    with _eval_mode(model), torch.no_grad():
        logits = model(prepare(model, images.to(like.device, like.dtype)))
    sure, chosen = logits.float().softmax(1).max(1)
    return sure.tolist(), chosen.tolist()


def _class(index: int, names: Sequence[str] | None) -> str:
    """A short name of a class."""
    name = str(names[index]) if names is not None and index < len(names) else str(index)
    return name if len(name) <= 14 else name[:13] + "…"
