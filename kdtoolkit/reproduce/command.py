"""The command `kdtoolkit reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kdtoolkit.reproduce.cells import Cell, Table, choose_cells, find_tables, read_tables
from kdtoolkit.reproduce.run import Budget, plan_cells, run_cells
from kdtoolkit.reproduce.show import print_results, print_tables
from kdtoolkit.utils.logging import configure_logging
from kdtoolkit.utils.validation import check_whole_number


@dataclass(frozen=True)
class Options:
    """Options of `kdtoolkit reproduce`.

    Attributes:
        target: A table, such as "srkd:table1", or all of a document, such as "srkd"; without it the
            tables are listed.
        row: One row, by name; all without it.
        column: One column, by name; all without it.
        epochs: Epochs in place of the protocol's; the learning rate falls at the same shares.
        rows: Training rows, drawn by class; all without it.
        seeds: Runs a cell, with seeds 0, 1, ...
        data: Folder that holds copies of data sets by name (cifar10/, cifar100/); without it they
            come from the Hub.
        teacher: Weights of the teacher; without them each is trained first, by the same protocol.
        mixed_precision: As of `distill()`.
        num_workers: As of `distill()`; without it "auto".
        output: Folder of all runs; what is finished in it is not run again.
        dry_run: Plan the cells and train nothing.
        show: Print what is finished and train nothing.
    """

    target: Annotated[str, tyro.conf.Positional] = ""
    row: str | None = None
    column: str | None = None
    epochs: int | None = None
    rows: int | None = None
    seeds: int = 1
    data: Path | None = None
    teacher: str | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    num_workers: int | None = None
    output: Path = Path("runs/reproduce")
    dry_run: bool = False
    show: bool = False

    @property
    def budget(self) -> Budget:
        """What replaces the protocol's numbers."""
        further = {"mixed_precision": self.mixed_precision, "num_workers": self.num_workers}
        return Budget(
            self.epochs, self.rows, self.seeds, self.output, self.data, self.teacher,
            {name: value for name, value in further.items() if value is not None},
        )  # fmt: skip


def reproduce(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: Words behind `kdtoolkit reproduce`.

    Raises:
        ValueError: For a table, row or column that is not there, or if the plan of a cell failed.
    """
    options = tyro.cli(
        Options,
        args=list(words),
        prog="kdtoolkit reproduce",
        description="Run the cells of the tables of papers, and print ours beside the published.",
    )
    check_whole_number("seeds", options.seeds, meaning="runs a cell")
    for name in ("epochs", "rows"):
        if getattr(options, name) is not None:
            check_whole_number(name, getattr(options, name))
    if not options.target:
        print_tables(list(read_tables().values()))
        return
    tables = {
        table: choose_cells(table, options.row, options.column)
        for table in find_tables(options.target)
    }
    configure_logging()
    if options.dry_run:
        _plan(tables, options.budget)
        return
    if not options.show:
        run_cells(tables, options.budget)
    for table, cells in tables.items():
        print_results(table, cells, options.budget)


def _plan(tables: dict[Table, list[Cell]], budget: Budget) -> None:
    def report(table: Table, cell: Cell, found: str) -> None:
        print(f"{table.key}  {cell.row}  {cell.column}  {found}", flush=True)

    failed = plan_cells(tables, budget, report)
    if failed:
        raise ValueError(f"{failed} cells cannot be planned")
