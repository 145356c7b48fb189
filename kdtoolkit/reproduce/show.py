"""Tables on the terminal: what is published beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from kdtoolkit.reproduce.cells import Cell, Table
from kdtoolkit.reproduce.run import Budget, read_results

NOT_RUN = "not yet run"


def print_tables(tables: Sequence[Table]) -> None:
    """List tables with their sizes and the rows that cannot be run.

    Args:
        tables: The tables.
    """
    grid = Grid("table", "shows", "rows", "columns", "missing", box=None)
    grid.columns[0].no_wrap = True
    for table in tables:
        missing = dict.fromkeys(cell.row for cell in table.cells if cell.missing)
        grid.add_row(
            table.key, table.title, str(len(table.rows)), str(len(table.columns)),
            ", ".join(missing),
        )  # fmt: skip
    Console().print(grid)


def print_results(table: Table, cells: Sequence[Cell], budget: Budget) -> None:
    """Print the published values of cells beside ours.

    Args:
        table: The table.
        cells: Its cells to print.
        budget: Which runs.
    """
    grid = Grid(
        "row", "column", "metric", "published", "here", "runs",
        title=f"{table.key}: {table.title}", title_justify="left",
    )  # fmt: skip
    for cell in cells:
        found = [] if cell.missing else read_results(table, cell, budget)
        for metric in table.metrics:
            ours = f"missing: {cell.missing}" if cell.missing else mean_and_deviation(found, metric)
            published = cell.published.get(metric, "")
            grid.add_row(cell.row, cell.column, metric, published, ours, str(len(found) or ""))
    console = Console()
    console.print(grid)
    for note in (describe_budget(table, budget), *table.notes):
        console.print(f"* {note}", soft_wrap=True, markup=False, highlight=False)


def describe_budget(table: Table, budget: Budget) -> str:
    """Say how the values here were trained.

    Args:
        table: The table.
        budget: What replaced the protocol's numbers.

    Returns:
        One line.
    """
    epochs = budget.epochs or max(cell.settings["epochs"] for cell in table.cells)
    length = f"{epochs} epoch" + ("s" if epochs > 1 else "")
    rows = "all training rows" if budget.rows is None else f"{budget.rows:,} training rows"
    given = "".join(f", {key}={value}" for key, value in (budget.settings or {}).items())
    changed = "" if budget.epochs is None and budget.rows is None else " at a smaller budget"
    return (
        f"here: protocol {table.protocol!r}{changed}, {length}, {rows}{given}; last epoch; "
        "mean ± standard deviation over runs"
    )


def mean_and_deviation(runs: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Mean of a metric over runs, with its standard deviation from two on.

    Args:
        runs: Metrics of every run.
        metric: Name of the metric.

    Returns:
        "71.20 ± 0.31", or that nothing was run.
    """
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return NOT_RUN
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"
