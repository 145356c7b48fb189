"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate. One that is named must be there."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

from kdtoolkit.core.callback import Callback
from kdtoolkit.types import Step


def available_trackers() -> list[str]:
    """Names of the trackers that are installed."""
    from accelerate.tracking import get_available_trackers

    return [str(getattr(t, "value", t)) for t in get_available_trackers()]


def resolve_trackers(report_to: str | list[str] | None, folder: bool = True) -> list[str]:
    """The trackers of a run: "auto" is TensorBoard where it is installed and the run has a folder, None or "none"
    nothing. ValueError if one is missing, or writes files and there is no `folder`."""
    if report_to in (None, "none", "off"):
        return []
    if report_to == "auto":
        return [t for t in available_trackers() if t == "tensorboard" and folder]
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    known = [
        t.value
        for t in LoggerType
        if t.value in {getattr(k, "value", k) for k in LOGGER_TYPE_TO_CLASS}
    ]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}; known: {', '.join(known)}")
        if name not in available_trackers():
            raise ValueError(
                f"tracker {name!r} was asked for and is not installed (installed: {', '.join(available_trackers()) or 'none'}): "
                f"pip install {name}, or report_to='none'"
            )
        if not folder and name in ("tensorboard", "dvclive"):
            raise ValueError(f"tracker {name!r} writes files: give output_dir, or report_to='none'")
    return names


class Trackers(Callback):
    """Sends every row of the journal that has numbers to accelerate's trackers."""

    def __init__(self, config: dict[str, Any]):
        self.config = {k: v for k, v in config.items() if isinstance(v, (int, float, str, bool))}
        self._sent = 0

    def on_fit_start(self, run: Any) -> None:
        run.accelerator.init_trackers("kdtoolkit", config=self.config)
        self._send(run)

    def on_step_end(self, run: Any, step: Step) -> None:
        self._send(run)

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        self._send(run)

    def on_fit_end(self, run: Any) -> None:
        self._send(run)
        run.accelerator.end_training()

    def _send(self, run: Any) -> None:
        for row in run.metrics_log.rows[self._sent :]:
            prefix = {"eval": f"{row.get('split')}/{row.get('network')}/", "train": "train/"}.get(
                row["event"]
            )
            if prefix:
                values = {prefix + k: v for k, v in row.items() if isinstance(v, float)}
                run.accelerator.log(values, step=row["step"])
        self._sent = len(run.metrics_log.rows)
