"""What a run prints: a bar with one entry per loss term, or a plain line per interval where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from kdtoolkit.core.callback import Callback
from kdtoolkit.types import Step


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
        self._last = self._began = 0.0  # seconds
        self._first = 0  # step at which this process began

    def on_fit_start(self, run: Any) -> None:
        if self.mode == "off" or not run.accelerator.is_main_process:
            self.mode = "off"
            return
        self._last = self._began = time.perf_counter()
        self._first, self._shown = run.clock.step, len(run.metrics_log.rows)
        self._print(self._opening(run))
        if run.data.test is None and run.data.val is None:
            self._print(
                "no evaluation data: the last epoch is taken; pass eval_data=... or validation=... for numbers"
            )
        for name, row in run.teacher_metrics.items():
            self._print(f"{name} top-1 {row['top1']:.2f} %")
        if self.mode == "bar" or (self.mode == "auto" and self.console.is_terminal):
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}"), console=self.console,
            )  # fmt: skip
            self.bar.start()
            self.task: TaskID = self.bar.add_task(
                self.label or "steps",
                total=run.clock.total_steps,
                completed=run.clock.step,
                terms="",
            )

    def on_step_end(self, run: Any, step: Step) -> None:
        if self.mode == "off":
            return
        row = self._new_row(run)
        if self.bar is not None:
            self.bar.update(self.task, completed=run.clock.step)
            if row:
                self.bar.update(self.task, terms=_terms(row))
        elif row and time.perf_counter() - self._last > self.interval:
            self._last = time.perf_counter()
            speed = f"{row['images_per_s']:.0f} images/s"
            self._print(f"{self._where(run)}  {_terms(row)}  {speed}  {self._left(run)}")

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        if self.mode == "off":
            return
        row = next(r for r in reversed(run.metrics_log.rows) if r["event"] == "epoch")
        every = (
            {"student", *run.method.networks()} if len(run.method.networks()) < 5 else {"student"}
        )
        shown = {*every, "ensemble", *run.export_candidates()[0]}  # of the networks
        tops = "  ".join(f"{k} {v:.2f}" for k, v in metrics.items() if _told(k, shown))
        self._print(
            "  ".join(p for p in (self._where(run), _terms(row), tops, self._left(run)) if p)
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=run.clock.step, terms=_terms(row))
        self._last = time.perf_counter()

    def on_fit_end(self, run: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_result(self, metrics: dict[str, Any]) -> None:
        """The last line, when the student is saved and measured. Not an event of the loop: distill() calls it."""
        if self.mode == "off" or "top1" not in metrics:
            return
        whose = f"{metrics['product']}, " if "networks" in metrics else ""
        text = f"{metrics['split']} top-1 {metrics['top1']:.2f} % ({whose}{metrics['chosen']} epoch, {metrics['epoch']})"
        if "retention" in metrics:
            text += f"  teacher {metrics['teacher_top1']:.2f} %  retention {100 * metrics['retention']:.1f} %"
        if "params" in metrics:
            text += f"  {metrics['params']:,} parameters"
        self._print(f"{self.label} {text}".strip())

    def _print(self, text: str) -> None:
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]", text, markup=True)

    def _opening(self, run: Any) -> str:
        a, clock = run.accelerator, run.clock
        many = "1 process" if a.num_processes == 1 else f"{a.num_processes} processes"
        begun = f", from step {clock.step}" if clock.step else ""
        told = f"{many} on {a.device.type}, precision {'fp32' if a.mixed_precision == 'no' else a.mixed_precision}"
        return f"{self.label} {told}, {clock.total_steps} steps, {clock.steps_per_epoch} an epoch{begun}".strip()

    def _new_row(self, run: Any) -> dict[str, Any] | None:
        rows = run.metrics_log.rows
        if len(rows) > self._shown and rows[-1]["event"] == "train":
            self._shown = len(rows)
            return rows[-1]
        return None

    def _where(self, run: Any) -> str:
        total = run.clock.total_steps / run.clock.steps_per_epoch
        return f"{self.label} epoch {run.clock.epochs:.4g}/{total:.4g}".strip()

    def _left(self, run: Any) -> str:
        done, left = run.clock.step - self._first, run.clock.total_steps - run.clock.step
        if not done or not left:
            return f"took {_span(time.perf_counter() - self._began)}" if not left else ""
        return f"{_span((time.perf_counter() - self._began) / done * left)} left"


def _told(key: str, shown: set[str]) -> bool:
    """Whether "test/top1" or "test/peer1/top1" is the accuracy or agreement of one of the networks."""
    split, _, rest = key.partition("/")
    network, _, number = rest.rpartition("/")
    return number in ("top1", "agreement") and bool(split) and (network or "student") in shown


def _terms(row: dict[str, Any]) -> str:
    terms = "  ".join(
        f"{k[5:]} {v:.4f}" for k, v in row.items() if k.startswith("loss/") and isinstance(v, float)
    )
    return f"loss {row['loss']:.4f}  ({terms})" if terms else ""


def _span(seconds: float) -> str:
    """Seconds as 5s, 3m20s or 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
