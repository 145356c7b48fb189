"""Figures of named curves. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_MATPLOTLIB = (
    "matplotlib is not installed, so there are no figures. To get them: "
    '`pip install "kdtoolkit[plot]"`, then write the report again.'
)
TEACHER_COLOR, ALONE_COLOR, DISTILLED_COLOR = "#333333", "#D55E00", "#0072B2"
PALETTE = [
    ALONE_COLOR,
    DISTILLED_COLOR,
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F6A00",
    "#7A52A8",
]
MAX_MARKED_POINTS = 12  # a curve of more points has no markers
LOG_RATIO = 30  # curves whose medians differ by more share a logarithmic axis


class Curve(NamedTuple):
    """One line of a figure.

    Attributes:
        x: Positions.
        y: Values, as many.
        color: Colour as matplotlib takes it.
        dashed: Whether the line is dashed.
        band: Half the width of a band around the line, one number for each point.
        raw: The values before smoothing, drawn pale.
    """

    x: list[float]
    y: list[float]
    color: str
    dashed: bool = False
    band: list[float] | None = None
    raw: list[float] | None = None


def new_figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot's global state.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, under a temporary name first.

    Args:
        figure: The figure.
        file: Path of the PNG; its folder is made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        with warnings.catch_warnings():
            # class names may be in a script that the font lacks
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(temporary, format="png")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def draw_curves(
    file: Path,
    title: str,
    x_label: str,
    y_label: str,
    curves: Mapping[str, Curve],
    levels: Mapping[str, float] | None = None,
) -> bool:
    """Draw named curves and horizontal lines into a PNG.

    Args:
        file: Path of the PNG.
        title: Title of the figure.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        curves: Name -> curve.
        levels: Name -> height of a horizontal line.

    Returns:
        Whether there was a finite point to draw; without one no file is written.
    """
    levels = levels or {}
    curves = {name: c for name, c in curves.items() if any(map(math.isfinite, c.y))}
    if not curves:
        return False
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    for name, y in levels.items():
        axes.axhline(y, color=TEACHER_COLOR, linestyle=(0, (5, 3)), linewidth=1.4, label=name)
    for name, curve in curves.items():
        _draw_curve(axes, name, curve)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _set_axes(axes, curves.values(), x_label)
    columns = 3 if max(map(len, [*curves, *levels])) > 18 else 5
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    save_figure(figure, file)
    return True


def _set_axes(axes: Axes, curves: Iterable[Curve], x_label: str) -> None:
    curves = list(curves)
    if _needs_log_axis(curves):
        axes.set_yscale("log")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    positions = {x for curve in curves for x in curve.x}
    if len(positions) == 1:
        axes.set_xlim(0, max(1.0, 2 * positions.pop()))
    if "epoch" in x_label:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_curve(axes: Axes, name: str, curve: Curve) -> None:
    if curve.raw is not None:
        axes.plot(curve.x, _with_gaps(curve.raw), color=curve.color, alpha=0.22, linewidth=0.8)
    has_markers = sum(map(math.isfinite, curve.y)) <= MAX_MARKED_POINTS
    axes.plot(
        curve.x,
        _with_gaps(curve.y),
        color=curve.color,
        linestyle="--" if curve.dashed else "-",
        linewidth=1.7,
        marker="o" if has_markers else None,
        markersize=4,
        label=name,
    )
    if curve.band is not None:
        low = [y - b for y, b in zip(curve.y, curve.band, strict=True)]
        high = [y + b for y, b in zip(curve.y, curve.band, strict=True)]
        axes.fill_between(
            curve.x,
            _with_gaps(low),
            _with_gaps(high),
            color=curve.color,
            alpha=0.15,
            linewidth=0,
        )


def _with_gaps(values: Sequence[float]) -> list[float]:
    """Nan for infinite values, which would stretch the axis."""
    return [value if math.isfinite(value) else math.nan for value in values]


def _needs_log_axis(curves: Sequence[Curve]) -> bool:
    """Whether all values are positive and the medians of the curves differ very much."""
    finite = [[y for y in curve.y if math.isfinite(y)] for curve in curves]
    raw = [y for curve in curves for y in curve.raw or [] if math.isfinite(y)]
    medians = [sorted(values)[len(values) // 2] for values in finite if values]
    smallest = min([*raw, *(min(values) for values in finite if values)])
    return smallest > 0 and max(medians) > LOG_RATIO * min(medians)
