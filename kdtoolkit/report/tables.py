"""The metrics of a run, and markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.report.run_folder import RunFolder

MISSING = "–"  # noqa: RUF001 - an en dash, as tables have it
COLUMNS = {  # key in a row -> heading
    "top1": "top-1 %",
    "top5": "top-5 %",
    "loss": "loss (nats)",
    "ece": "ECE %",
    "agreement": "agreement with teacher %",
    "params": "parameters",
    "macs": "MACs",
    "latency_ms": "latency (ms)",
}
COUNTS = ("params", "macs")
PERCENTAGES = ("top1", "top5", "ece", "agreement")
COMPRESSION_PARTS = {  # key in a row -> heading
    "compression_score": "compression score (harmonic mean of retention above chance and saved)",
    "retention": "retention, top-1 / teacher's top-1",
    "retention_above_chance": "retention above chance",
    "saved": "saved share of the cost, 1 - 1 / compression",
    "compression": "compression, geometric mean of the ratios",
    "params_ratio": "parameters, teacher / student",
    "macs_ratio": "MACs, teacher / student",
    "latency_ratio": "latency, teacher / student",
}
TEACHER_PREFIX = "teacher_"
UNITS = (("G", 1e9), ("M", 1e6), ("K", 1e3))


# --------------------------------------------------------------------------------------- metrics
def student_metrics(run: RunFolder) -> MetricsRow:
    """The final row of a run, completed by the evaluation of its epoch.

    Args:
        run: The run. One that is not finished has the metrics of its last evaluation.

    Returns:
        Metrics by name; empty without any evaluation.
    """
    final = run.last_row("final")
    rows = run.evaluations(split=final.get("split")) or run.evaluations()
    if "top1" not in final:
        without_event = {key: value for key, value in final.items() if key != "event"}
        return (rows[-1] if rows else {}) | without_event
    epoch = final.get("epoch")
    same_epoch = (row for row in reversed(rows) if epoch is None or row.get("epoch") == epoch)
    return next(same_epoch, {}) | final


def teacher_metrics(run: RunFolder, split: str | None = None) -> MetricsRow:
    """The first teacher's own evaluation.

    What the final row says of the teacher takes precedence where it is of the same split.

    Args:
        run: The run.
        split: Name of the split; by default that of the student's final metrics.

    Returns:
        Metrics by name; empty without a teacher.
    """
    final = run.last_row("final")
    wanted = split or student_metrics(run).get("split")
    rows = [row for row in run.rows if row.get("event") == "teacher"]
    row = next((r for r in rows if r.get("split") == wanted), rows[0] if rows else {})
    if split is not None and final.get("split", split) != split:
        return row
    return row | {
        key.removeprefix(TEACHER_PREFIX): value
        for key, value in final.items()
        if key.startswith(TEACHER_PREFIX)
    }


def compression_parts(run: RunFolder) -> MetricsRow:
    """Compression and retention of a finished run.

    Args:
        run: The run.

    Returns:
        Numbers under the keys of `COMPRESSION_PARTS`, where they are known. "retention" is
        top1 / teacher_top1 and no part of the score, which takes "retention_above_chance".
    """
    final = run.last_row("final")
    retention = {"retention": final["retention"]} if "retention" in final else {}
    if isinstance(final.get("compression"), Mapping):
        return {**final["compression"], **retention}
    return {key: final[key] for key in COMPRESSION_PARTS if key in final}


def describe_source(run: RunFolder) -> str:
    """One or two sentences: of which epoch, split and network the student's metrics are.

    Args:
        run: The run.

    Returns:
        Text, markdown; it says so where the run has no evaluation or has not finished.
    """
    final, row = run.last_row("final"), student_metrics(run)
    if not row:
        return "No evaluation of the student was found."
    epoch, split = row.get("epoch"), row.get("split")
    place = f" (epoch {epoch})" if epoch is not None else ""
    place += f", on the {split} split" if split else ""
    if not final:
        return (
            "The run has no final row, so it has not finished: "
            f"the numbers are of the last evaluation{place}."
        )
    chosen = final.get("chosen")
    if chosen not in ("last", "best"):
        return (
            f"The student's numbers are of its final evaluation{place}; "
            "the run does not say if that is the last or the best."
        )
    text = f"The student's numbers are of the **{chosen}** epoch{place}."
    if "networks" in final:
        reason = final.get("exported_reason", final.get("product_reason", "no reason is given"))
        text += f" The exported network is `{run.exported}`: {reason}."
    return text


# ---------------------------------------------------------------------------------------- format
def format_metric(key: str, value: Any) -> str:
    """A metric as text, with the digits that its kind needs.

    Args:
        key: Name of the metric, which decides the digits.
        value: A number, a text, which is returned, or None.
    """
    if value is None or isinstance(value, str):
        return value or MISSING
    if not math.isfinite(value):
        return str(value)
    if key in COUNTS:
        return format_count(value)
    if key.endswith("_ratio") or key == "compression":
        return f"{value:.2f}×"  # noqa: RUF001
    digits = 2 if key in PERCENTAGES else 3
    return f"{value:.{digits}f}"


def format_count(value: float) -> str:
    """A count as text: 278324 is "278.3 K", 41 is "41".

    Args:
        value: The count.

    Returns:
        From 1000 on, in K, M or G: two decimals below 100 of the unit, else one. Below 1000, a
        whole number.
    """
    for unit, size in UNITS:
        if value >= size:
            digits = 2 if value < 100 * size else 1
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:.0f}"


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, align_right: bool = True
) -> str:
    """A markdown table.

    Args:
        heads: Headings.
        rows: Cells of each row.
        align_right: Align all columns but the first to the right.
    """
    rule = ["---"] + ["---:" if align_right else "---"] * (len(heads) - 1)
    return "\n".join(_table_line(line) for line in (heads, rule, *rows))


def _table_line(cells: Sequence[str]) -> str:
    escaped = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def metrics_table(networks: Mapping[str, MetricsRow]) -> str:
    """A markdown table with one row for each network; columns that no network has are left out.

    Args:
        networks: Name of a network -> its metrics.
    """
    keys = [k for k in COLUMNS if any(row.get(k) is not None for row in networks.values())]
    rows = [
        [name, *(format_metric(key, row.get(key)) for key in keys)]
        for name, row in networks.items()
    ]
    return markdown_table(["network", *(COLUMNS[key] for key in keys)], rows)
