"""The numbers of a run, and markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdtoolkit.report.run_folder import Row, RunFolder

MISSING = "–"
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
PARTS = {
    "compression_score": "compression score (harmonic mean of retention above chance and saved)",
    "retention": "retention, top-1 / teacher's top-1",
    "retention_above_chance": "retention above chance",
    "saved": "saved share of the cost, 1 - 1 / compression",
    "compression": "compression, geometric mean of the ratios",
    "params_ratio": "parameters, teacher / student",
    "macs_ratio": "MACs, teacher / student",
    "latency_ratio": "latency, teacher / student",
}


def student_numbers(run: RunFolder) -> Row:
    """The student's final row, filled up from its evaluation of that epoch; its last evaluation if not finished."""
    final = run.last("final")
    rows = run.evals(split=final.get("split"))
    if not rows:
        rows = run.evals()
    if "top1" not in final:
        return {**(rows[-1] if rows else {}), **{k: v for k, v in final.items() if k != "event"}}
    same = next(
        (r for r in reversed(rows) if r.get("epoch") == final.get("epoch", r.get("epoch"))), {}
    )
    return {**same, **final}


def teacher_numbers(run: RunFolder, split: str | None = None) -> Row:
    """The first teacher's own evaluation on a split, by default that of the student's final numbers.

    What the final row says under teacher_* goes first, where it is of the same split.
    """
    final = run.last("final")
    wanted = split or student_numbers(run).get("split")
    rows = [row for row in run.rows if row.get("event") == "teacher"]
    row = next((r for r in rows if r.get("split") == wanted), rows[0] if rows else {})
    if split is not None and final.get("split", split) != split:
        return row
    return {**row, **{k[8:]: v for k, v in final.items() if k.startswith("teacher_")}}


def compression_parts(run: RunFolder) -> Row:
    """The final row's dict `compression`, or what of it stands in the row itself, or empty.

    With the row's own `retention`, top1 / teacher_top1, which is no part of the score: that one is above chance.
    """
    final = run.last("final")
    own = {"retention": final["retention"]} if "retention" in final else {}
    if isinstance(final.get("compression"), Mapping):
        return {**final["compression"], **own}
    return {key: final[key] for key in PARTS if key in final}


def where_from(run: RunFolder) -> str:
    """One sentence: of which epoch and split the student's numbers are."""
    final, row = run.last("final"), student_numbers(run)
    if not row:
        return "No evaluation of the student was found."
    epoch, split = row.get("epoch"), row.get("split")
    at = (f" (epoch {epoch})" if epoch is not None else "") + (
        f", on the {split} split" if split else ""
    )
    if not final:
        return f"The run has no final row, so it has not finished: the numbers are of the last evaluation{at}."
    chosen = final.get("chosen")
    if chosen in ("last", "best"):
        handed = (
            f" Handed over is `{final['product']}`: {final['exported_reason']}."
            if "networks" in final
            else ""
        )
        return f"The student's numbers are of the **{chosen}** epoch{at}.{handed}"
    return f"The student's numbers are of its final evaluation{at}; the run does not say if that is the last or the best."


def number(key: str, value: Any) -> str:
    """A number as text, with the digits that its kind deserves; – for none."""
    if value is None or isinstance(value, str):
        return value or MISSING
    if not math.isfinite(value):
        return str(value)
    if key in ("params", "macs"):
        return count(value)
    if key.endswith("_ratio") or key == "compression":
        return f"{value:.2f}×"
    digits = 2 if key in ("top1", "top5", "ece", "agreement") else 3
    return f"{value:.{digits}f}"


def count(value: float) -> str:
    """278324 -> 278.3 K, 41 -> 41."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return (
                f"{value / size:.2f} {unit}" if value < 100 * size else f"{value / size:.1f} {unit}"
            )
    return f"{value:.0f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> str:
    """Markdown table: first column to the left, the others to the right, or all to the left."""
    lines = [heads, ["---"] + ["---:" if right else "---"] * (len(heads) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |"
        for line in lines
    )


def numbers_table(networks: Mapping[str, Row]) -> str:
    """One line per network; columns that no network has are left out."""
    keys = [k for k in COLUMNS if any(row.get(k) is not None for row in networks.values())]
    rows = [[name, *(number(k, row.get(k)) for k in keys)] for name, row in networks.items()]
    return table(["network", *(COLUMNS[k] for k in keys)], rows)
