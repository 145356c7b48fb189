"""Curves. matplotlib is imported when a figure is drawn, never before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtoolkit.report.run_folder import Row, RunFolder, put

HOW_TO = (
    'matplotlib is not installed, so there are no figures. To get them: `pip install "kdtoolkit[plot]"`, then write '
    "the report again."
)
TEACHER, ALONE, DISTILLED = "#333333", "#D55E00", "#0072B2"
PALETTE = [ALONE, DISTILLED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#7A52A8"]
TERMS = {
    "total": "#222222",
    "ce": "#D55E00",
    "kd": "#0072B2",
    "srkd": "#009E73",
}  # others take what is left


class Curve(NamedTuple):
    """Points of one line; band: half its width, one number per point; raw: the unsmoothed y of the same x."""

    x: list[float]
    y: list[float]
    color: str
    dashed: bool = False
    band: list[float] | None = None
    raw: list[float] | None = None


def new_figure(width: float, height: float) -> Any:
    """A figure in inches, away from pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def save(figure: Any, file: Path) -> None:
    """Write the PNG in one move."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # class names in a script that the font lacks
        put(file, lambda temporary: figure.savefig(temporary, format="png"))


def curves(
    file: Path,
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Curve],
    level: Row | None = None,
) -> bool:
    """Draw named lines and horizontal `level`s {name: y}; False, and no file, when there is no finite point."""
    lines = {name: line for name, line in lines.items() if any(map(math.isfinite, line.y))}
    if not lines:
        return False
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    for name, y in (level or {}).items():
        axes.axhline(y, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.4, label=name)
    for name, line in lines.items():
        _draw(axes, name, line)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if _wide(lines):
        axes.set_yscale("log")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    places = {x for line in lines.values() for x in line.x}
    if len(places) == 1:
        axes.set_xlim(0, max(1.0, 2 * places.pop()))
    if "epoch" in x_label:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    columns = 3 if max(map(len, [*lines, *(level or {})])) > 18 else 5
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    save(figure, file)
    return True


def _draw(axes: Any, name: str, line: Curve) -> None:
    if line.raw is not None:
        axes.plot(line.x, _finite(line.raw), color=line.color, alpha=0.22, linewidth=0.8)
    style = {"linestyle": "--"} if line.dashed else {}
    marker = "o" if sum(map(math.isfinite, line.y)) <= 12 else None
    axes.plot(
        line.x,
        _finite(line.y),
        color=line.color,
        linewidth=1.7,
        marker=marker,
        markersize=4,
        label=name,
        **style,
    )
    if line.band is not None:
        low = [y - b for y, b in zip(line.y, line.band, strict=True)]
        high = [y + b for y, b in zip(line.y, line.band, strict=True)]
        axes.fill_between(
            line.x, _finite(low), _finite(high), color=line.color, alpha=0.15, linewidth=0
        )


def _finite(values: Sequence[float]) -> list[float]:
    return [v if math.isfinite(v) else math.nan for v in values]  # gaps, not infinite axes


def _wide(lines: Mapping[str, Curve]) -> bool:
    """Lines of very different size are drawn on a logarithmic axis."""
    known = [v for line in lines.values() for v in [*line.y, *(line.raw or [])] if math.isfinite(v)]
    ends = [y for line in lines.values() if (y := [v for v in line.y if math.isfinite(v)])]
    middle = [sorted(y)[len(y) // 2] for y in ends]
    return min(known) > 0 and max(middle) > 30 * min(middle)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average under a triangle of about a fifteenth of the points, over finite ones only."""
    half, found = max(len(values) // 30, 1), []
    for i in range(len(values)):
        near = range(max(0, i - half), min(len(values), i + half + 1))
        known = [(1 + half - abs(i - k), values[k]) for k in near if math.isfinite(values[k])]
        found.append(sum(w * v for w, v in known) / sum(w for w, _ in known) if known else math.nan)
    return found


def points(
    rows: Sequence[Row], x: str, y: str, per: float = 1.0
) -> tuple[list[float], list[float]]:
    """Values of `y` over `x` / per where both are numbers; the newest of each x."""
    found = {
        float(r[x]) / per: float(r[y])
        for r in rows
        if _is_number(r.get(x)) and _is_number(r.get(y))
    }
    return sorted(found), [found[key] for key in sorted(found)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def loss_curves(run: RunFolder, file: Path) -> bool:
    """figures/loss.png: every weighted loss term and the total, smoothed over raw."""
    rows = [r for r in run.rows if r.get("event") == "train"]
    keys = dict.fromkeys(k for r in rows for k in r if k.startswith("loss/"))
    names = {"loss": "total", **{k: k.removeprefix("loss/") for k in keys}}
    if len(keys) == 1:  # the only term is the total
        names = {"loss": f"total = {next(iter(keys)).removeprefix('loss/')}"}
    per, spare = run.steps_per_epoch, [c for c in PALETTE if c not in TERMS.values()]
    lines = {}
    for key, name in names.items():
        x, y = points(rows, "step", key, per or 1.0)
        color = TERMS.get(name.split(" ")[0]) or (spare.pop(0) if spare else "#999999")
        lines[name] = Curve(x, smooth(y), color, raw=y) if len(y) >= 10 else Curve(x, y, color)
    title = "Training loss: total and its weighted terms" if len(keys) > 1 else "Training loss"
    return curves(
        file,
        title,
        "epoch" if per else "step (batches)",
        "loss, weighted (nats for CE and KD)",
        lines,
    )


def eval_curves(run: RunFolder, baseline: RunFolder | None, key: str) -> dict[str, Curve]:
    """Evaluations by epoch of the product, of the student trained alone, and of other networks of the run."""
    lines = {}
    if baseline is not None:
        lines["student alone"] = Curve(
            *points(baseline.evals(split=split_of(run)) or baseline.evals(), "epoch", key), ALONE
        )
    spare = iter(PALETTE[2:] * 9)
    for name in run.networks:
        x, y = points(run.evals(name, split_of(run)) or run.evals(name), "epoch", key)
        product = name == run.product
        shown = "distilled student" if product and distilled(run) else name
        lines[shown] = Curve(x, y, DISTILLED if product else next(spare), dashed=not product)
    return lines


def split_of(run: RunFolder) -> str | None:
    """The split of the student's curve."""
    rows = run.evals()
    return rows[0].get("split") if rows else None


def distilled(run: RunFolder) -> bool:
    """Whether a teacher took part, as far as the folder tells."""
    return bool(
        run.config.get("teacher") or run.last("teacher") or "teacher_top1" in run.last("final")
    )
