"""What a run prints: a bar with its losses, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import MetricsRow, RunContext
from kdtoolkit.types import Step
from kdtoolkit.utils.validation import check_choice, check_non_negative, describe_value

MODES = ("auto", "bar", "lines", "off")
MAX_NETWORKS = 4  # of more networks, only those that may be exported are shown


class ProgressLog(Callback):
    """Prints the progress of a run; only rank 0 prints.

    Args:
        mode: "auto" (a bar on a terminal, otherwise lines), "bar", "lines" or "off".
        interval: Seconds between two plain lines of one epoch; the end of an epoch is always
            printed.
        label: Text in front of every line.
    """

    def __init__(self, mode: str = "auto", *, interval: float = 30.0, label: str = "") -> None:
        check_choice("progress", mode, MODES)
        check_non_negative("interval", interval, "seconds between two lines")
        if not isinstance(label, str):
            raise ValueError(f"label is {describe_value(label)}; allowed: text")
        self.mode, self.interval, self.label = mode, interval, label
        self.console = Console(soft_wrap=True, highlight=False)
        self.bar: Progress | None = None
        self._num_rows_seen = 0
        self._last_line = self._began = 0.0  # seconds
        self._first_step = 0  # of this process

    def on_fit_start(self, run: RunContext) -> None:
        """Print where the run starts, and the accuracy of the teachers; open the bar."""
        if self.mode == "off" or not run.accelerator.is_main_process:
            self.mode = "off"
            return
        self._last_line = self._began = time.perf_counter()
        self._first_step, self._num_rows_seen = run.clock.step, len(run.metrics_log.rows)
        self._print(self._first_line(run))
        if run.data.test is None and run.data.val is None:
            self._print(
                "no evaluation data: the last epoch is taken; pass eval_data=... or validation=... "
                "for numbers"
            )
        for name, row in run.teacher_metrics.items():
            self._print(f"{name} top-1 {row['top1']:.2f} %")
        if self.mode == "bar" or (self.mode == "auto" and self.console.is_terminal):
            self._open_bar(run)

    def _open_bar(self, run: RunContext) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=self.console,
        )
        self.bar.start()
        total, done = run.clock.total_steps, run.clock.step
        description = escape(self.label) or "steps"
        self.task: TaskID = self.bar.add_task(description, total=total, completed=done, terms="")

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """Move the bar, or print a line where it is time."""
        if self.mode == "off":
            return
        row = self._new_row(run)
        if self.bar is not None:
            self.bar.update(self.task, completed=run.clock.step)
            if row:
                self.bar.update(self.task, terms=_describe_losses(row))
        elif row and time.perf_counter() - self._last_line > self.interval:
            self._last_line = time.perf_counter()
            speed = f"{row['images_per_s']:.0f} images/s"
            parts = (self._position(run), _describe_losses(row), speed, self._time_left(run))
            self._print("  ".join(parts))

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Print losses and accuracies of the epoch."""
        if self.mode == "off":
            return
        row = next(r for r in reversed(run.metrics_log.rows) if r["event"] == "epoch")
        networks = _shown_networks(run)
        accuracies = {k: v for k, v in metrics.items() if _is_shown(k, networks)}
        texts = "  ".join(f"{name} {value:.2f}" for name, value in accuracies.items())
        parts = (self._position(run), _describe_losses(row), texts, self._time_left(run))
        self._print("  ".join(part for part in parts if part))
        if self.bar is not None:
            self.bar.update(self.task, completed=run.clock.step, terms=_describe_losses(row))
        self._last_line = time.perf_counter()

    def on_fit_end(self, run: RunContext) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_result(self, metrics: Mapping[str, Any]) -> None:
        """Print the last line, when the student is saved and measured.

        Not an event of the loop: `distill()` calls it.

        Args:
            metrics: `DistillResult.metrics`.
        """
        if self.mode == "off" or "top1" not in metrics:
            return
        network = f"{metrics['exported']}, " if "networks" in metrics else ""
        epoch = f"{network}{metrics['chosen']} epoch, {metrics['epoch']}"
        text = f"{metrics['split']} top-1 {metrics['top1']:.2f} % ({epoch})"
        if "retention" in metrics:
            text += f"  teacher {metrics['teacher_top1']:.2f} %"
            text += f"  retention {100 * metrics['retention']:.1f} %"
        if "params" in metrics:
            text += f"  {metrics['params']:,} parameters"
        self._print(f"{self.label} {text}".strip())

    def _print(self, text: str) -> None:
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]", escape(text), markup=True)

    def _first_line(self, run: RunContext) -> str:
        accelerator, clock = run.accelerator, run.clock
        ranks = accelerator.num_processes
        processes = "1 process" if ranks == 1 else f"{ranks} processes"
        half = accelerator.mixed_precision
        precision = "fp32" if half == "no" else half
        where = f"{processes} on {accelerator.device.type}, precision {precision}"
        resumed = f", from step {clock.step}" if clock.step else ""
        steps = f"{clock.total_steps} steps, {clock.steps_per_epoch} an epoch{resumed}"
        return f"{self.label} {where}, {steps}".strip()

    def _new_row(self, run: RunContext) -> MetricsRow | None:
        """The last row, if it is a new one of training losses."""
        rows = run.metrics_log.rows
        if len(rows) == self._num_rows_seen or rows[-1]["event"] != "train":
            return None
        self._num_rows_seen = len(rows)
        row: MetricsRow = rows[-1]
        return row

    def _position(self, run: RunContext) -> str:
        total = run.clock.total_steps / run.clock.steps_per_epoch
        return f"{self.label} epoch {run.clock.epochs:.4g}/{total:.4g}".strip()

    def _time_left(self, run: RunContext) -> str:
        done = run.clock.step - self._first_step
        left = run.clock.total_steps - run.clock.step
        seconds = time.perf_counter() - self._began
        if not left:
            return f"took {_format_seconds(seconds)}"
        return f"{_format_seconds(seconds / done * left)} left" if done else ""


def _shown_networks(run: RunContext) -> set[str]:
    """Names of the networks whose accuracy is printed."""
    trained = list(run.method.networks())
    shown = trained if len(trained) <= MAX_NETWORKS else []
    return {"student", *shown, "ensemble", *run.export_candidates()[0]}


def _is_shown(key: str, networks: set[str]) -> bool:
    """Whether "test/top1" or "test/peer1/top1" is the accuracy or agreement of a network."""
    split, _, rest = key.partition("/")
    network, _, number = rest.rpartition("/")
    return number in ("top1", "agreement") and bool(split) and (network or "student") in networks


def _describe_losses(row: MetricsRow) -> str:
    """The sum and each term of a row; "" for a row without losses."""
    terms = [
        f"{name.removeprefix('loss/')} {value:.4f}"
        for name, value in row.items()
        if name.startswith("loss/") and isinstance(value, float)
    ]
    return f"loss {row['loss']:.4f}  ({'  '.join(terms)})" if terms else ""


def _format_seconds(seconds: float) -> str:
    """Seconds as 5s, 3m20s or 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
