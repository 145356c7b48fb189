"""Several runs, or groups of runs that differ by seed, in one table and two figures."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.report import plots, tables
from kdtoolkit.report.curves import points
from kdtoolkit.report.run_folder import RunFolder, read
from kdtoolkit.utils.io import write_text
from kdtoolkit.utils.paths import expand_home

Folder = str | os.PathLike[str]
Groups = Mapping[str, Sequence[RunFolder]]  # name -> runs that differ by seed


def compare(runs: Mapping[str, Folder | Sequence[Folder]], out_dir: Folder) -> Path:
    """Write report.md, figures/accuracy.png and figures/eval_loss.png about several runs.

    Args:
        runs: Name -> run folder, or several that differ by seed, which are shown as mean ± standard
            deviation (of the sample, n - 1) with n. The others are compared with the first.
        out_dir: Folder of the page.

    Returns:
        Path of report.md.

    Raises:
        ValueError: If there are no runs, a name has no folder, or a folder does not exist.

    Example:
        ```python
        from kdtoolkit import report

        groups = {"alone": "runs/alone", "kd": ["runs/kd-0", "runs/kd-1"]}
        report.compare(groups, "runs/compared")
        ```
    """
    if not runs:
        raise ValueError(
            "compare got no runs; pass names and run folders, "
            "such as {'alone': 'runs/alone', 'kd': 'runs/kd'}"
        )
    groups = {name: [read(folder) for folder in _as_list(given)] for name, given in runs.items()}
    empty = [name for name, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"compare got no folder for {empty}; "
            "pass one run folder or a list of them for each name"
        )
    out = Path(expand_home(os.fspath(out_dir)))
    text = [f"# Comparison: {', '.join(groups)}", _metrics_table(groups), _describe_runs(groups)]
    notes = []
    try:
        text += _draw_figures(groups, out / "figures")
    except ImportError:
        notes.append(plots.NO_MATPLOTLIB)
    for name, group in groups.items():
        for run in group:
            notes += [f"{name}, {run.path.name}: {problem}" for problem in run.problems]
    if notes:
        text += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    return out / "report.md"


def _as_list(given: Folder | Sequence[Folder]) -> list[Folder]:
    if isinstance(given, (str, os.PathLike)):
        return [given]
    return list(given)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample (n - 1); the latter is nan for a single value.

    Args:
        values: The values, at least one.

    Returns:
        Mean and standard deviation, in the unit of the values; the latter is nan too where a value
        is not finite.
    """
    mean = statistics.fmean(values)
    has_std = len(values) > 1 and all(map(math.isfinite, values))
    return mean, statistics.stdev(values) if has_std else math.nan


# ----------------------------------------------------------------------------------------- table
def _metrics_table(groups: Groups) -> str:
    """One row for each group: its name, n, metrics, and the gain over the first group."""
    metrics = {name: [tables.student_metrics(r) for r in group] for name, group in groups.items()}
    rows = [row for group in metrics.values() for row in group]
    keys = [k for k in tables.COLUMNS if any(row.get(k) is not None for row in rows)]
    first = next(iter(metrics))
    lines = []
    for name, group in metrics.items():
        gain = tables.MISSING if name == first else _gain(group, metrics[first])
        cells = [_mean_cell(key, group) for key in keys]
        lines.append([name, str(len(group)), *cells, gain])
    headings = [tables.COLUMNS[key] for key in keys]
    return tables.markdown_table(["run", "n", *headings, f"top-1 against {first}"], lines)


def _known_values(key: str, rows: Sequence[MetricsRow]) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _gain(rows: Sequence[MetricsRow], base: Sequence[MetricsRow]) -> str:
    """Difference of the mean top-1 accuracies, in points."""
    ours, theirs = _known_values("top1", rows), _known_values("top1", base)
    if not ours or not theirs:
        return tables.MISSING
    return f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}"


def _mean_cell(key: str, rows: Sequence[MetricsRow]) -> str:
    values = _known_values(key, rows)
    if not values:
        return tables.MISSING
    mean, std = mean_and_std(values)
    text = tables.format_metric(key, mean)
    if math.isfinite(std) and key not in tables.COUNTS:
        text += f" ± {tables.format_metric(key, std)}"
    return text if len(values) == len(rows) else f"{text} (n = {len(values)})"


def _describe_runs(groups: Groups) -> str:
    """Lines under the table: of which epoch and split the metrics are, the teachers' accuracy."""
    names_by_kind: dict[str, list[str]] = {}
    for name, group in groups.items():
        kinds = {_describe_choice(run) for run in group}
        names_by_kind.setdefault(" and ".join(sorted(kinds)), []).append(name)
    lines = [f"* {', '.join(names)}: {kind}" for kind, names in names_by_kind.items()]
    teachers = _teacher_accuracies(groups)
    if teachers:
        lines.append(f"* teacher: {', '.join(f'{top1:.2f} %' for top1 in teachers)} top-1")
    if _has_seeds(groups):
        lines.append("* mean ± standard deviation over n runs (n - 1 in the denominator)")
    if len(names_by_kind) > 1:
        lines += [
            "",
            "**Compare with care: not all numbers are of the same kind of epoch and split.**",
        ]
    return "\n".join(lines)


def _describe_choice(run: RunFolder) -> str:
    row = tables.student_metrics(run)
    return f"{row.get('chosen', 'last found')} epoch, {row.get('split', 'unknown')} split"


def _has_seeds(groups: Groups) -> bool:
    return any(len(group) > 1 for group in groups.values())


def _teacher_accuracies(groups: Groups) -> list[float]:
    """The different top-1 accuracies of teachers in percent, to two digits."""
    rows = [tables.teacher_metrics(run) for group in groups.values() for run in group]
    return sorted({round(top1, 2) for top1 in _known_values("top1", rows)})


# --------------------------------------------------------------------------------------- figures
def _draw_figures(groups: Groups, folder: Path) -> list[str]:
    """Draw both figures; markdown that shows those that were drawn."""
    teachers = _teacher_accuracies(groups)
    levels = {f"teacher ({teachers[0]:.2f} %)": teachers[0]} if len(teachers) == 1 else None
    splits = sorted({run.curve_split or "eval" for group in groups.values() for run in group})
    place = f"on the {' / '.join(splits)} split"
    if _has_seeds(groups):
        place += ", mean ± standard deviation"
    text = []
    for name, key, title, unit, lines in (
        ("accuracy", "top1", f"Accuracy {place}", "top-1 accuracy (%)", levels),
        ("eval_loss", "loss", f"Loss {place}", "cross-entropy (nats)", None),
    ):
        curves = {
            label: _mean_curve(group, key, number)
            for number, (label, group) in enumerate(groups.items())
        }
        if plots.draw_curves(folder / f"{name}.png", title, "epoch", unit, curves, lines):
            text.append(f"![{name}](figures/{name}.png)")
    return text


def _mean_curve(group: Sequence[RunFolder], key: str, number: int) -> plots.Curve:
    """Mean over the runs that have an epoch, with the standard deviation as a band."""
    by_epoch: dict[float, list[float]] = {}
    for run in group:
        for epoch, value in zip(*points(run.evaluations(), "epoch", key), strict=True):
            by_epoch.setdefault(epoch, []).append(value)
    epochs = sorted(by_epoch)
    means_and_stds = [mean_and_std(by_epoch[epoch]) for epoch in epochs]
    band = None
    if len(group) > 1:
        band = [std if math.isfinite(std) else 0.0 for _, std in means_and_stds]
    return plots.Curve(
        epochs,
        [mean for mean, _ in means_and_stds],
        color=plots.PALETTE[number % len(plots.PALETTE)],
        dashed=number >= len(plots.PALETTE),
        band=band,
    )
