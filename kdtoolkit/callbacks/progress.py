"""What a run prints: a progress bar with one entry per loss term, or a plain line per interval where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..types import Step
from .base import Callback


class ProgressLog(Callback):
    """`mode`: "auto" (a bar on a terminal, else lines), "bar", "lines" or "off". Only rank 0 prints.

    interval  seconds between two plain lines of one epoch; the end of an epoch is always printed
    """

    def __init__(self, mode: str = "auto", *, interval: float = 30.0, label: str = ""):
        if mode not in ("auto", "bar", "lines", "off"):
            raise ValueError(f"progress is {mode!r}, allowed are 'auto', 'bar', 'lines' and 'off'")
        self.mode, self.interval, self.label = mode, interval, label
        self.console = Console(soft_wrap=True, highlight=False)
        self.bar: Progress | None = None
        self._shown = 0
        self._last = 0.0

    def on_fit_start(self, run: Any) -> None:
        if self.mode == "off" or not run.accelerator.is_main_process:
            self.mode = "off"
            return
        self._last = time.perf_counter()
        for name, row in run.teacher_metrics.items():
            self.console.print(f"{name} top-1 {row['top1']:.2f} %")
        if self.mode == "bar" or (self.mode == "auto" and self.console.is_terminal):
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}"), console=self.console,
            )  # fmt: skip
            self.bar.start()
            self.task: TaskID = self.bar.add_task(self.label, total=run.clock.total_steps, terms="")

    def on_step_end(self, run: Any, step: Step) -> None:
        if self.mode == "off":
            return
        row = self._new_row(run)
        if self.bar is not None:
            fields = {"terms": _terms(row)} if row else {}
            self.bar.update(self.task, completed=run.clock.step, **fields)
        elif row and time.perf_counter() - self._last > self.interval:
            self._last = time.perf_counter()
            self.console.print(f"{self._where(run)}  {_terms(row)}  {row['images_per_s']:.0f} images/s")

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        if self.mode == "off":
            return
        rows = [r for r in run.journal.rows if r["event"] == "train"]
        tops = "  ".join(f"{k} {v:.2f}" for k, v in metrics.items() if k.endswith(("top1", "agreement")))
        self.console.print(f"{self._where(run)}  {_terms(rows[-1]) if rows else ''}  {tops}")
        self._last = time.perf_counter()

    def on_fit_end(self, run: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _new_row(self, run: Any) -> dict[str, Any] | None:
        rows = run.journal.rows
        if len(rows) > self._shown and rows[-1]["event"] == "train":
            self._shown = len(rows)
            return rows[-1]
        return None

    def _where(self, run: Any) -> str:
        total = run.clock.total_steps / run.clock.steps_per_epoch
        epochs = f"epoch {run.clock.epochs:.1f}/{total:.0f}" if run.clock.step else "start"
        return f"{self.label} {epochs}".strip()


def _terms(row: dict[str, Any]) -> str:
    terms = "  ".join(f"{k[5:]} {v:.4f}" for k, v in row.items() if k.startswith("loss/") and isinstance(v, float))
    return f"loss {row['loss']:.4f}  ({terms})" if terms else ""
