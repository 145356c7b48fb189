"""The tables and figures of the source documents: one cell is one configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdtoolkit.methods.factory import list_methods, method_needs_teacher
from kdtoolkit.utils.registry import suggestion
from kdtoolkit.utils.validation import check_choice

TABLES = Path(__file__).parent / "tables"
# settings of a cell that its teacher is trained with
PROTOCOL_SETTINGS = (
    "train_data", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay",
    "scheduler", "milestones", "gamma", "validation",
)  # fmt: skip
TEACHER = "teacher"  # value of the setting "network" in a row that trains the teacher itself


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        row: Name of the row, mostly a method.
        column: Name of the column, mostly networks or data.
        settings: Keywords of `distill()`.
        published: The document's values by metric, as it prints them; empty where it has none.
        missing: Why the cell cannot be run; "" where it can.
        is_teacher: Whether it trains the teacher of its column, which other cells learn from.
    """

    row: str
    column: str
    settings: Mapping[str, Any]
    published: Mapping[str, str]
    missing: str = ""
    is_teacher: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """One table or figure of a document.

    Attributes:
        document: Short name of the document, such as "srkd".
        name: Name of the table in the document, such as "table1".
        title: What it shows.
        protocol: Name of the training schedule.
        metrics: What is measured, first the metric that is compared.
        notes: What a reader must know to compare.
        cells: All cells, row by row.
    """

    document: str
    name: str
    title: str
    protocol: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def key(self) -> str:
        """Document and name, as one writes them: "srkd:table1"."""
        return f"{self.document}:{self.name}"

    @property
    def rows(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(cell.column for cell in self.cells))


def read_tables() -> dict[str, Table]:
    """Read the tables of all documents.

    Returns:
        Key, such as "srkd:table1" -> table.
    """
    return {t.key: t for file in sorted(TABLES.glob("*.yaml")) for t in _make_tables(file)}


def read_protocols(document: str) -> dict[str, dict[str, Any]]:
    """Read the training schedules of a document.

    Args:
        document: Its short name, such as "dcl".

    Returns:
        Name of a protocol -> keywords of `distill()`.

    Raises:
        ValueError: If there is no such document.
    """
    known = [file.stem for file in sorted(TABLES.glob("*.yaml"))]
    check_choice("document", document, known)
    protocols: dict[str, dict[str, Any]] = _read_document(TABLES / f"{document}.yaml")["protocols"]
    return protocols


def find_tables(target: str) -> list[Table]:
    """Find the tables that a target means.

    Args:
        target: A table, "srkd:table1", or all of a document, "srkd".

    Returns:
        The tables.

    Raises:
        ValueError: If there is no such table or document.
    """
    known = read_tables()
    found = [t for t in known.values() if target in (t.key, t.document)]
    if not found:
        names = [*known, *{t.document for t in known.values()}]
        raise ValueError(
            f"no table {target!r}{suggestion(target, names)}; known: {', '.join(known)}"
        )
    return found


def choose_cells(table: Table, row: str | None, column: str | None) -> list[Cell]:
    """Choose cells of a table.

    Args:
        table: The table.
        row: Name of a row; None is all.
        column: Name of a column; None is all.

    Returns:
        The cells, in the table's order.

    Raises:
        ValueError: If the table has no such row or column.
    """
    for kind, name, names in (("row", row, table.rows), ("column", column, table.columns)):
        if name is not None and name not in names:
            raise ValueError(
                f"{table.key} has no {kind} {name!r}{suggestion(name, names)}; {kind}s: "
                f"{', '.join(names)}"
            )
    return [c for c in table.cells if row in (None, c.row) and column in (None, c.column)]


@functools.cache
def _read_document(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return document


@functools.cache
def _make_tables(file: Path) -> tuple[Table, ...]:
    document = _read_document(file)
    protocols = document["protocols"]
    return tuple(
        _make_table(file.stem, name, raw, protocols[raw["protocol"]])
        for name, raw in document["tables"].items()
    )


def _make_table(document: str, name: str, raw: dict[str, Any], protocol: dict[str, Any]) -> Table:
    metrics = tuple(raw.get("metrics", ["top1"]))
    shared = protocol | raw.get("settings", {})
    cells = []
    for row, content in raw["rows"].items():
        own, published = content.get("settings", {}), content.get("published")
        values = published or [None] * len(raw["columns"])
        for (column, networks), value in zip(raw["columns"].items(), values, strict=True):
            given = shared | networks | own
            is_teacher = given.pop("network", None) == TEACHER
            settings, missing = _teacher_settings(given) if is_teacher else _settings(given)
            cells.append(
                Cell(
                    row, column, settings, _by_metric(metrics, value),
                    content.get("missing") or missing, is_teacher,
                )
            )  # fmt: skip
    return Table(
        document, name, raw["title"], raw["protocol"], metrics, tuple(raw.get("notes", ())),
        tuple(cells),
    )  # fmt: skip


def teacher_cell(cell: Cell) -> Cell:
    """The cell that trains the teacher of another cell, by the same protocol.

    Args:
        cell: A cell that learns from a teacher.

    Returns:
        The cell, which may stand in no table.
    """
    settings, _ = _teacher_settings(cell.settings)
    return Cell(TEACHER, cell.column, settings, {}, is_teacher=True)


def _teacher_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Keywords of `distill()` that train the teacher alone."""
    alone = {"student": given["teacher"], "teacher": None, "method": "none"}
    return {name: given[name] for name in PROTOCOL_SETTINGS if name in given} | alone, ""


def _settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Keywords of `distill()`, and why they cannot be run."""
    settings = dict(given)
    options = settings.pop("options", {})
    method = settings.get("method")
    if method is not None and method not in list_methods():
        return settings | options, f"the method {method!r} is not there yet"
    if method is not None and not method_needs_teacher(method):
        settings["teacher"] = None
    return settings | options, ""


def _by_metric(metrics: tuple[str, ...], value: object) -> dict[str, str]:
    values = value if isinstance(value, list) else [value]
    named = zip(metrics, values, strict=False)
    return {name: _as_printed(v) for name, v in named if v is not None}


def _as_printed(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else str(value)
