"""Runs the cells of tables, one after the other; what is finished is not run again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from kdtoolkit.pipeline.distill import distill
from kdtoolkit.reproduce.cells import Cell, Table, teacher_cell
from kdtoolkit.utils.io import write_json

logger = logging.getLogger(__name__)
SAME_NUMBERS = ("num_workers",)  # settings that change no result


@dataclass(frozen=True)
class Budget:
    """What replaces the protocol's numbers, and where things lie.

    Attributes:
        epochs: Epochs; None is the protocol's. The learning rate falls at the same shares of the
            run.
        rows: Training rows, drawn by class; None is all.
        seeds: Number of runs a cell, with seeds 0, 1, ...
        output: Folder of all runs.
        data: Folder that holds data sets by name ("cifar10/", ...); None is the Hub.
        teacher: Weights of the teachers; None trains each first, with the same protocol.
        settings: Further keywords of `distill()`, such as mixed_precision.
    """

    epochs: int | None = None
    rows: int | None = None
    seeds: int = 1
    output: Path = Path("runs/reproduce")
    data: Path | None = None
    teacher: str | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the folder of runs with this budget: "full", "epochs12-rows5000"."""
        changed = {k: v for k, v in (self.settings or {}).items() if k not in SAME_NUMBERS}
        parts = {"epochs": self.epochs, "rows": self.rows} | changed
        given = [f"{key}{value}" for key, value in parts.items() if value is not None]
        return _file_name("-".join(given)) or "full"

    @property
    def teacher_name(self) -> str:
        """What runs that learn from given weights have behind that name: "-teacher-1f3a9c04"."""
        if self.teacher is None:
            return ""
        path = os.path.abspath(self.teacher) if os.path.exists(self.teacher) else self.teacher
        return f"-teacher-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def plan_cells(
    tables: Mapping[Table, Sequence[Cell]],
    budget: Budget,
    report: Callable[[Table, Cell, str], None],
) -> int:
    """Make the plan of every cell; no weights are loaded and nothing is trained.

    Args:
        tables: Table -> its cells.
        budget: What replaces the protocol's numbers.
        report: Called with every cell and what came of it: "planned", or why it cannot be run.

    Returns:
        Number of cells whose plan failed.
    """
    failed = 0
    for table, cells in tables.items():
        for cell in cells:
            found = f"missing: {cell.missing}" if cell.missing else "planned"
            if not cell.missing:
                try:
                    distill(**_keywords(cell, budget, 0), dry_run=True)
                except (ValueError, OSError, RuntimeError) as error:
                    failed, found = failed + 1, f"failed: {error}"
            report(table, cell, found)
    return failed


def run_cells(tables: Mapping[Table, Sequence[Cell]], budget: Budget) -> None:
    """Run cells that are not finished, with every seed; runs that were stopped go on.

    Args:
        tables: Table -> its cells.
        budget: What replaces the protocol's numbers.
    """
    for table, cells in tables.items():
        for cell in cells:
            if cell.missing:
                logger.info("%s %s %s: missing, %s", table.key, cell.row, cell.column, cell.missing)
                continue
            for seed in range(budget.seeds):
                _run_cell(table, cell, budget, seed)


def read_results(table: Table, cell: Cell, budget: Budget) -> list[dict[str, Any]]:
    """Read the metrics of the finished runs of a cell.

    Args:
        table: The table.
        cell: The cell.
        budget: Which runs.

    Returns:
        Metrics of each seed that is finished.
    """
    files = [_result_file(table, cell, budget, seed) for seed in range(budget.seeds)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _run_cell(table: Table, cell: Cell, budget: Budget, seed: int) -> None:
    """Train a cell in the folder beside its result file, and write that at the end."""
    file = _result_file(table, cell, budget, seed)
    if file.exists():
        return
    keywords = _keywords(cell, budget, seed)
    if keywords["teacher"] is not None:
        keywords["teacher"] = budget.teacher or _train_teacher(table, cell, budget)
    logger.info("%s  row %s  column %s  seed %d", table.key, cell.row, cell.column, seed)
    folder = file.with_suffix("")
    result = distill(**keywords, output_dir=folder, resume="auto", label=folder.parent.name)
    plain = {k: v for k, v in result.metrics.items() if isinstance(v, (int, float, str))}
    processes = PartialState()
    if processes.is_main_process:
        write_json(file, plain)
    processes.wait_for_everyone()  # all find it, or none


def _train_teacher(table: Table, cell: Cell, budget: Budget) -> str:
    """Folder of the teacher of a cell, which is trained where it is not there yet."""
    teacher = teacher_cell(cell)
    _run_cell(table, teacher, budget, 0)
    return str(_result_file(table, teacher, budget, 0).with_suffix("") / "student")


def _keywords(cell: Cell, budget: Budget, seed: int) -> dict[str, Any]:
    keywords = {"teacher": None} | dict(cell.settings) | {"seed": seed, "figures": False}
    if budget.epochs is not None:
        keywords["epochs"] = budget.epochs
    if budget.rows is not None:
        keywords["train_limit"] = budget.rows
    if budget.data is not None:
        keywords["data_path"] = budget.data / keywords["train_data"]
    return keywords | dict(budget.settings or {})


def _result_file(table: Table, cell: Cell, budget: Budget, seed: int) -> Path:
    """File of the metrics of a run; teachers are shared by the tables of a document."""
    if cell.is_teacher:
        names = (cell.settings["train_data"], cell.settings["student"])
        place = Path("teachers", table.protocol, _file_name("_".join(names)))
        given = ""
    else:
        place = Path(table.name, _file_name(cell.row), _file_name(cell.column))
        given = budget.teacher_name if cell.settings.get("teacher") is not None else ""
    return budget.output / table.document / place / f"{budget.name}{given}" / f"seed{seed}.json"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)
