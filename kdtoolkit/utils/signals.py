"""Ctrl-C and SIGTERM as a request to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeAlias

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SignalHandler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; it was saved first."""


@contextlib.contextmanager
def catch_stop_signals(request_stop: Callable[[], bool]) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM request a stop; a second signal ends the program at once.

    Outside of the main thread, where handlers cannot be set, signals are left alone.

    Args:
        request_stop: Called at every signal; returns whether one came before.

    Raises:
        KeyboardInterrupt: At the second signal.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if request_stop():
            raise KeyboardInterrupt

    previous: dict[signal.Signals, SignalHandler] = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
