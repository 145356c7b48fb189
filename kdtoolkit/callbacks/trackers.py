"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate.

A tracker that is named must be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import MetricsRow, RunContext
from kdtoolkit.types import Step
from kdtoolkit.utils.validation import describe_value

WRITES_FILES = ("tensorboard", "dvclive")


def available_trackers() -> list[str]:
    """Names of the trackers that are installed."""
    return [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]


def known_trackers() -> list[str]:
    """Names of the trackers that accelerate supports."""
    supported = {getattr(tracker, "value", tracker) for tracker in LOGGER_TYPE_TO_CLASS}
    return [tracker.value for tracker in LoggerType if tracker.value in supported]


def resolve_trackers(report_to: str | list[str] | None, has_folder: bool = True) -> list[str]:
    """The trackers of a run.

    Args:
        report_to: Name or names of trackers. "auto" is TensorBoard, where it is installed and the
            run has a folder; None, "none" or "off" is none.
        has_folder: Whether the run has a folder, for trackers that write files.

    Raises:
        ValueError: If a tracker is unknown or not installed, or writes files and there is no
            folder.
    """
    if report_to in (None, "none", "off"):
        return []
    installed = available_trackers()
    if report_to == "auto":
        return ["tensorboard"] if has_folder and "tensorboard" in installed else []
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if name not in known_trackers():
            raise ValueError(f"unknown tracker {name!r}; known: {', '.join(known_trackers())}")
        if name not in installed:
            raise ValueError(
                f"tracker {name!r} is not installed (installed: {', '.join(installed) or 'none'}): "
                f"pip install {name}, or report_to='none'"
            )
        if not has_folder and name in WRITES_FILES:
            raise ValueError(f"tracker {name!r} writes files: give output_dir, or report_to='none'")
    return names


class Trackers(Callback):
    """Sends the numbers of every row of the metrics log to accelerate's trackers.

    Args:
        config: Configuration of the run; its plain values are sent as hyper-parameters.

    Raises:
        ValueError: If it is no mapping.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if not isinstance(config, Mapping):
            raise ValueError(
                f"config is {describe_value(config)}; allowed: a dictionary of hyper-parameters"
            )
        self.config = {k: v for k, v in config.items() if isinstance(v, (int, float, str, bool))}
        self._num_sent = 0

    def on_fit_start(self, run: RunContext) -> None:
        """Start the trackers."""
        run.accelerator.init_trackers("kdtoolkit", config=self.config)
        self._send(run)

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """Send new rows."""
        self._send(run)

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Send new rows."""
        self._send(run)

    def on_fit_end(self, run: RunContext) -> None:
        """Send new rows, and close the trackers."""
        self._send(run)
        run.accelerator.end_training()

    def _send(self, run: RunContext) -> None:
        rows = run.metrics_log.rows
        for row in rows[self._num_sent :]:
            prefix = _prefix(row)
            if prefix is not None:
                values = {prefix + k: v for k, v in row.items() if isinstance(v, float)}
                run.accelerator.log(values, step=row["step"])
        self._num_sent = len(rows)


def _prefix(row: MetricsRow) -> str | None:
    """In front of the names of a row's numbers; None for a row that is not sent."""
    if row["event"] == "eval":
        return f"{row.get('split')}/{row.get('network')}/"
    return "train/" if row["event"] == "train" else None
