"""The rows of a run on disk: metrics.jsonl and summary.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.trainer.epoch_evaluation import metric_name
from kdtoolkit.utils.io import to_plain, write_text


class MetricsLog:
    """Rows of a run, in memory and, on rank 0 with a folder, in `metrics.jsonl`.

    A row has "epoch" (finished epochs), "step" (batches since the start) and "event":

    - "teacher": metrics of a teacher on a split
    - "train": mean losses since the last such row, and "lr", the learning rate of its last step
      (the highest where layers have several), as callbacks left it
    - "epoch": mean losses of an epoch
    - "eval": metrics of a network on a split after an epoch
    - "final": the metrics of the result

    Args:
        folder: Folder of the run; None keeps rows in memory only.
        write: Whether this rank writes the file.

    Attributes:
        rows: All rows, in the order in which they were added.
        path: The file that is written; None where none is.
    """

    def __init__(self, folder: Path | None, write: bool = True) -> None:
        self._file = folder / "metrics.jsonl" if folder is not None else None
        self.path = self._file if write else None
        self.rows: list[MetricsRow] = []

    def add(self, **row: Any) -> MetricsRow:
        """Append one row, and write it where the run has a folder.

        Args:
            **row: "event", "epoch", "step" and further values; what JSON cannot hold becomes text.

        Returns:
            The row as it was written.

        Raises:
            OSError: If the file cannot be written, for instance because the disk is full.
        """
        plain: MetricsRow = to_plain(row)
        self.rows.append(plain)
        if self.path is None:
            return plain
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
        except OSError as error:
            last = self.path.parent / "checkpoints" / "last"
            kept = f"{last} is whole" if last.exists() else "there is no checkpoint yet"
            raise OSError(
                f"could not write {self.path}: {error}; {kept}: free some space and continue with "
                "resume='auto'"
            ) from error
        return plain

    def rewind(self, step: int) -> None:
        """Take over the rows that an earlier part of the run wrote up to a step.

        Later rows, the final row and an incomplete last line are removed from the file.

        Args:
            step: Batches since the start.
        """
        if self._file is None or not self._file.exists():
            return
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        for row in map(_parse_row, lines):
            if row and row["step"] <= step and row["event"] != "final":
                self.rows.append(row)
        if self.path is not None:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write_summary(self) -> None:
        """Write `summary.csv`: one row an epoch, the means of its losses and its evaluations."""
        if self.path is None:
            return
        epochs = _summarise_epochs(self.rows)
        columns = list(dict.fromkeys(name for row in epochs for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(epochs)
        write_text(self.path.with_name("summary.csv"), text.getvalue())


def _parse_row(line: str) -> MetricsRow | None:
    """A line of metrics.jsonl; None where it is incomplete or no row."""
    try:
        row: MetricsRow = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and "event" in row
    return row if is_row else None


def _summarise_epochs(rows: Iterable[MetricsRow]) -> list[MetricsRow]:
    """One row an epoch, in order, of the rows "epoch" and "eval"."""
    epochs: dict[int, MetricsRow] = {}
    for row in rows:
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        if row["event"] == "eval":
            named = {metric_name(row["split"], row["network"], k): v for k, v in numbers.items()}
        elif row["event"] == "epoch":
            named = {f"train/{name}": value for name, value in numbers.items()}
        else:
            continue
        position = {"epoch": row["epoch"], "step": row["step"]}
        epochs.setdefault(row["epoch"], position).update(named)
    return [epochs[epoch] for epoch in sorted(epochs)]
