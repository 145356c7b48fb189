"""Rows of Grad-CAM pictures: the images, then one row a network (Figure 6 of the SRKD paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kdtoolkit.report.gradcam import gradcam, predict
from kdtoolkit.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

RIGHT_COLOR, WRONG_COLOR, NEUTRAL_COLOR = "#1A7F37", "#CF222E", "#333333"
MAX_IMAGES = 10
MAX_NAME = 14  # characters of a class name


def gradcam_rows(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] = "gradcam.png",
) -> Path | None:
    """Draw images, and over them each network's Grad-CAM of the class that it predicts.

    Below an image stands its label; below a network's picture the predicted class and its
    probability, green if it is the label, red if not.

    Args:
        models: Name -> network.
        images: Images (B, 3, H, W) in [0, 1], of which up to 10 are drawn.
        labels: Class ids (B,).
        class_names: Names by class id.
        path: Path of the PNG.

    Returns:
        Path of the PNG; None where there is no model or no image.

    Raises:
        ValueError: If images or labels have another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) in [0, 1]")
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"{len(labels)} labels for {len(images)} images; pass one each, or labels=None"
        )
    if not models or not len(images):
        return None
    images = images.detach()[:MAX_IMAGES]
    classes = None if labels is None else [int(label) for label in labels[: len(images)]]
    columns, rows = len(images), 1 + len(models)
    figure = new_figure(1.9 + 1.3 * columns, 0.5 + 1.55 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    _clear_axes(grid, ["image", *models])
    _draw_images(grid[0], images, classes, class_names)
    for row, model in zip(grid[1:], models.values(), strict=True):
        picture = _draw_gradcam(row, model, images, classes, class_names)
    bar = figure.colorbar(picture, ax=grid, shrink=0.6, pad=0.015, ticks=[0, 1], aspect=24)
    bar.ax.set_yticklabels(["little", "much"], fontsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    title = "Grad-CAM"
    if columns > 3:
        title += ": where each network looks for the class it chose"
    figure.suptitle(title, fontsize=11)
    save_figure(figure, Path(path))
    return Path(path)


def _clear_axes(grid: Any, names: Sequence[str]) -> None:
    """No ticks and frames; the names of the rows on the left."""
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, name in zip(grid[:, 0], names, strict=True):
        lines = name.replace(" ", "\n")
        axes.set_ylabel(lines, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)


def _draw_images(
    row: Sequence[Axes],
    images: Tensor,
    classes: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> None:
    colored = images[:, :3].float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    pixels: Array = colored.permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    for i, axes in enumerate(row):
        axes.imshow(pixels[i], interpolation="nearest", vmin=0, vmax=1)
        if classes is not None:
            name = _short_class_name(classes[i], class_names)
            axes.set_xlabel(name, fontsize=9, color=NEUTRAL_COLOR)


def _draw_gradcam(
    row: Sequence[Axes],
    model: nn.Module,
    images: Tensor,
    classes: Sequence[int] | None,
    class_names: Sequence[str] | None,
) -> AxesImage:
    """Draw one network's row; the last overlay, for the colour bar."""
    grey: Array = images.float().mean(1).cpu().clamp(0, 1).numpy()  # (B, H, W)
    maps: Array = gradcam(model, images).cpu().numpy()  # (B, H, W)
    probabilities, predicted = predict(model, images)
    for i, axes in enumerate(row):
        picture = _draw_overlay(axes, grey[i], maps[i])
        color = NEUTRAL_COLOR
        if classes is not None:
            color = RIGHT_COLOR if predicted[i] == classes[i] else WRONG_COLOR
        name = _short_class_name(predicted[i], class_names)
        axes.set_xlabel(f"{name}, {100 * probabilities[i]:.0f} %", fontsize=9, color=color)
    return picture


def _draw_overlay(axes: Axes, grey: Array, cam: Array) -> AxesImage:
    """The map over the grey image; both cover the same square, whatever their resolution."""
    axes.imshow(0.25 + 0.65 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return axes.imshow(cam, cmap="jet", vmin=0, vmax=1, alpha=0.5, interpolation="bilinear")


def _short_class_name(index: int, names: Sequence[str] | None) -> str:
    name = str(names[index]) if names is not None and index < len(names) else str(index)
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
