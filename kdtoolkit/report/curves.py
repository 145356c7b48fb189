"""The curves of a run: losses over the steps, evaluations over the epochs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.report.plots import ALONE_COLOR, DISTILLED_COLOR, PALETTE, Curve, draw_curves
from kdtoolkit.report.run_folder import RunFolder

TERM_COLORS = {"total": "#222222", "ce": "#D55E00", "kd": "#0072B2", "srkd": "#009E73"}
LAST_COLOR = "#999999"  # of terms for which the palette has no colour left
MIN_SMOOTHED = 10  # points; a shorter curve is drawn as it is
SMOOTHED_SHARE = 30  # half the window is one of so many parts of a curve


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average with triangular weights over about a fifteenth of the points.

    Args:
        values: Values, of which those that are not finite are left out.

    Returns:
        As many values; nan where the window holds no finite one.
    """
    half = max(len(values) // SMOOTHED_SHARE, 1)
    smoothed = []
    for centre in range(len(values)):
        window = range(max(0, centre - half), min(len(values), centre + half + 1))
        known = [
            (1 + half - abs(centre - i), values[i]) for i in window if math.isfinite(values[i])
        ]
        total = sum(weight for weight, _ in known)
        smoothed.append(sum(w * value for w, value in known) / total if known else math.nan)
    return smoothed


def points(
    rows: Sequence[MetricsRow], x: str, y: str, unit: float = 1.0
) -> tuple[list[float], list[float]]:
    """Two numbers of rows as points, sorted by x.

    Args:
        rows: The rows; those in which one of the two is no number are left out.
        x: Key of the position.
        y: Key of the value.
        unit: Positions are divided by this.

    Returns:
        Positions and values; of several values at one position the newest.
    """
    found = {
        float(row[x]) / unit: float(row[y])
        for row in rows
        if _is_number(row.get(x)) and _is_number(row.get(y))
    }
    return sorted(found), [found[position] for position in sorted(found)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_loss_curves(run: RunFolder, file: Path) -> bool:
    """Draw the total loss and every weighted term, smoothed over raw.

    Args:
        run: The run.
        file: Path of the PNG.

    Returns:
        Whether there was something to draw.
    """
    rows = [row for row in run.rows if row.get("event") == "train"]
    terms = list(dict.fromkeys(k for row in rows for k in row if k.startswith("loss/")))
    names = {"loss": "total"} | {term: term.removeprefix("loss/") for term in terms}
    if len(terms) == 1:  # it equals the total
        names = {"loss": f"total = {terms[0].removeprefix('loss/')}"}
    steps_per_epoch = run.steps_per_epoch
    spare = (color for color in PALETTE if color not in TERM_COLORS.values())
    curves = {}
    for key, name in names.items():
        color = TERM_COLORS.get(name.split(" ")[0]) or next(spare, LAST_COLOR)
        x, y = points(rows, "step", key, steps_per_epoch or 1.0)
        is_long = len(y) >= MIN_SMOOTHED
        curves[name] = Curve(x, smooth(y), color, raw=y) if is_long else Curve(x, y, color)
    return draw_curves(
        file,
        "Training loss: total and its weighted terms" if len(terms) > 1 else "Training loss",
        "epoch" if steps_per_epoch else "step (batches)",
        "loss, weighted (nats for CE and KD)",
        curves,
    )


def evaluation_curves(run: RunFolder, baseline: RunFolder | None, key: str) -> dict[str, Curve]:
    """Evaluations by epoch of the networks of a run and of the student trained alone.

    Args:
        run: The run; its exported network has a solid line, others have dashed ones.
        baseline: Run of the same student trained alone.
        key: Name of the metric.

    Returns:
        Name in the legend -> curve.
    """
    split = run.curve_split
    curves = {}
    if baseline is not None:
        rows = baseline.evaluations(split=split) or baseline.evaluations()
        curves["student alone"] = Curve(*points(rows, "epoch", key), ALONE_COLOR)
    spare = itertools.cycle(PALETTE[2:])
    for network in run.networks:
        rows = run.evaluations(network, split) or run.evaluations(network)
        is_exported = network == run.exported
        name = "distilled student" if is_exported and run.has_teacher else network
        color = DISTILLED_COLOR if is_exported else next(spare)
        curves[name] = Curve(*points(rows, "epoch", key), color, dashed=not is_exported)
    return curves
