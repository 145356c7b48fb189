"""Several runs, or groups of runs that differ by seed, in one table and two figures."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdtoolkit.report import plots, tables
from kdtoolkit.report.run_folder import RunFolder, put_text, read

Folder = str | os.PathLike[str]


def compare(runs: Mapping[str, Folder | Sequence[Folder]], out_dir: Folder) -> Path:
    """Write report.md, figures/accuracy.png and figures/eval_loss.png about several runs.

    runs  {"alone": folder, "kd": [folder, folder, ...]}: a list is a group of seeds, shown as mean ± standard deviation
          (of the sample, n - 1) with n. The first is the one that the others are compared with.
    Returns the path of report.md.
    """
    if not runs:
        raise ValueError(
            "compare got no runs; pass names and run folders, such as {'alone': 'runs/alone', 'kd': 'runs/kd'}"
        )
    groups = {
        name: [read(f) for f in ([given] if _is_folder(given) else given)]
        for name, given in runs.items()
    }  # type: ignore[union-attr, arg-type]
    empty = [name for name, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"compare got no folder for {empty}; pass one run folder or a list of them for each name"
        )
    out, notes = Path(out_dir), list[str]()
    text = [f"# Comparison: {', '.join(groups)}", _table(groups), _fine_print(groups)]
    try:
        text += _figures(groups, out / "figures")
    except ImportError:
        notes.append(plots.HOW_TO)
    notes += [
        f"{name}, {run.path.name}: {p}"
        for name, group in groups.items()
        for run in group
        for p in run.problems
    ]
    if notes:
        text += ["## Notes", "\n".join(f"* {note}" for note in notes)]
    put_text(out / "report.md", "\n\n".join(text) + "\n")
    return out / "report.md"


def _is_folder(given: Folder | Sequence[Folder]) -> bool:
    return isinstance(given, str | os.PathLike)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation (nan for a single value)."""
    mean = statistics.fmean(values)
    known = len(values) > 1 and all(map(math.isfinite, values))
    return mean, statistics.stdev(values) if known else math.nan


def _cell(key: str, rows: Sequence[Mapping[str, float]]) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return tables.MISSING
    mean, std = mean_std(values)
    text = tables.number(key, mean)
    if math.isfinite(std) and key not in ("params", "macs"):
        text += f" ± {tables.number(key, std)}"
    return text if len(values) == len(rows) else f"{text} (n = {len(values)})"


def _table(groups: Mapping[str, list[RunFolder]]) -> str:
    rows = {name: [tables.student_numbers(run) for run in group] for name, group in groups.items()}
    keys = [
        k
        for k in tables.COLUMNS
        if any(r.get(k) is not None for group in rows.values() for r in group)
    ]
    first = next(iter(rows))
    base = [r["top1"] for r in rows[first] if r.get("top1") is not None]
    lines = []
    for name, group in rows.items():
        top1 = [r["top1"] for r in group if r.get("top1") is not None]
        gain = (
            f"{statistics.fmean(top1) - statistics.fmean(base):+.2f}"
            if top1 and base and name != first
            else tables.MISSING
        )
        lines.append([name, str(len(group)), *(_cell(k, group) for k in keys), gain])
    heads = ["run", "n", *(tables.COLUMNS[k] for k in keys), f"top-1 against {first}"]
    return tables.table(heads, lines)


def _fine_print(groups: Mapping[str, list[RunFolder]]) -> str:
    chosen: dict[str, list[str]] = {}
    for name, group in groups.items():
        kinds = {
            f"{r.get('chosen', 'last found')} epoch, {r.get('split', 'unknown')} split"
            for r in map(tables.student_numbers, group)
        }
        chosen.setdefault(" and ".join(sorted(kinds)), []).append(name)
    lines = [f"* {', '.join(names)}: {kind}" for kind, names in chosen.items()]
    teachers = _teachers(groups)
    if teachers:
        lines.append(f"* teacher: {', '.join(f'{t:.2f} %' for t in teachers)} top-1")
    if any(len(group) > 1 for group in groups.values()):
        lines.append("* mean ± standard deviation over n runs (n - 1 in the denominator)")
    care = (
        ""
        if len(chosen) == 1
        else "\n\n**Compare with care: not all numbers are of the same kind of epoch and split.**"
    )
    return "\n".join(lines) + care


def _teachers(groups: Mapping[str, list[RunFolder]]) -> list[float]:
    found = [tables.teacher_numbers(run).get("top1") for group in groups.values() for run in group]
    return sorted({round(t, 2) for t in found if t is not None})


def _figures(groups: Mapping[str, list[RunFolder]], folder: Path) -> list[str]:
    teachers = _teachers(groups)
    level = {f"teacher ({teachers[0]:.2f} %)": teachers[0]} if len(teachers) == 1 else None
    splits = sorted({plots.split_of(run) or "eval" for group in groups.values() for run in group})
    split = f"{' / '.join(splits)} split"
    band = ", mean ± standard deviation" if any(len(group) > 1 for group in groups.values()) else ""
    text = []
    for file, key, title, unit, lines in (
        ("accuracy.png", "top1", f"Accuracy on the {split}{band}", "top-1 accuracy (%)", level),
        ("eval_loss.png", "loss", f"Loss on the {split}{band}", "cross-entropy (nats)", None),
    ):
        drawn = {name: _curve(group, key, i) for i, (name, group) in enumerate(groups.items())}
        if plots.curves(folder / file, title, "epoch", unit, drawn, lines):
            text.append(f"![{file.removesuffix('.png')}](figures/{file})")
    return text


def _curve(group: Sequence[RunFolder], key: str, place: int) -> plots.Curve:
    """Mean over the runs that have the epoch, with the standard deviation as a band."""
    by_epoch: dict[float, list[float]] = {}
    for run in group:
        for epoch, value in zip(*plots.points(run.evals(), "epoch", key), strict=True):
            by_epoch.setdefault(epoch, []).append(value)
    x = sorted(by_epoch)
    both = [mean_std(by_epoch[epoch]) for epoch in x]
    color = plots.PALETTE[place % len(plots.PALETTE)]
    band = [std if math.isfinite(std) else 0.0 for _, std in both] if len(group) > 1 else None
    return plots.Curve(x, [mean for mean, _ in both], color, place >= len(plots.PALETTE), band)
