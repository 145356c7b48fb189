"""Runs the cells of tables, one after the other; what is finished is not run again."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtoolkit.pipeline.distill import distill
from kdtoolkit.reproduce.cells import Cell, Table
from kdtoolkit.utils.io import write_json

logger = logging.getLogger(__name__)
LOSS_SETTINGS = ("teacher", "method", "losses", "options")


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
        parts = {"epochs": self.epochs, "rows": self.rows} | dict(self.settings or {})
        given = [f"{key}{value}" for key, value in parts.items() if value is not None]
        return _file_name("-".join(given)) or "full"


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
    file = _result_file(table, cell, budget, seed)
    if file.exists():
        return
    keywords = _keywords(cell, budget, seed)
    if keywords.get("teacher") is not None:
        keywords["teacher"] = budget.teacher or _trained_teacher(table, cell, budget)
    logger.info("%s  row %s  column %s  seed %d", table.key, cell.row, cell.column, seed)
    _train(keywords, file)


def _train(keywords: Mapping[str, Any], file: Path) -> None:
    """Train in the folder beside a result file, and write that at the end."""
    folder = file.with_suffix("")
    result = distill(**keywords, output_dir=folder, resume="auto", label=folder.parent.name)
    plain = {k: v for k, v in result.metrics.items() if isinstance(v, (int, float, str))}
    write_json(file, plain)


def _trained_teacher(table: Table, cell: Cell, budget: Budget) -> str:
    """Folder of the teacher of a cell, which is trained first where it is not there yet."""
    settings = {k: v for k, v in cell.settings.items() if k not in LOSS_SETTINGS}
    alone = {"student": cell.settings["teacher"], "teacher": None, "method": "none"}
    settings = {name: settings[name] for name in settings if name in _PROTOCOL_SETTINGS} | alone
    names = (settings["train_data"], settings["student"])
    folder = budget.output / table.document / "teachers" / table.protocol / "_".join(names)
    file = folder / budget.name / "seed0.json"
    if not file.exists():
        logger.info("%s  the teacher %s is trained first", table.key, settings["student"])
        teacher = Cell("teacher", cell.column, settings, {})
        _train(_keywords(teacher, budget, 0), file)
    return str(file.with_suffix("") / "student")


# settings of a cell that its teacher is trained with
_PROTOCOL_SETTINGS = (
    "train_data", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
    "scheduler", "milestones", "gamma", "validation",
)  # fmt: skip


def _keywords(cell: Cell, budget: Budget, seed: int) -> dict[str, Any]:
    keywords = dict(cell.settings) | {"seed": seed, "figures": False}
    if budget.epochs is not None:
        keywords["epochs"] = budget.epochs
    if budget.rows is not None:
        keywords["train_limit"] = budget.rows
    if budget.data is not None:
        keywords["data_path"] = budget.data / keywords["train_data"]
    keywords.setdefault("teacher", None)
    return keywords | dict(budget.settings or {})


def _result_file(table: Table, cell: Cell, budget: Budget, seed: int) -> Path:
    place = Path(table.document, table.name, _file_name(cell.row), _file_name(cell.column))
    return budget.output / place / budget.name / f"seed{seed}.json"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)
