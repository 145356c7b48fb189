"""Ctrl-C and SIGTERM as a flag."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; it was saved first."""


@contextlib.contextmanager
def catch_stop_signals(flag: Callable[[], bool]) -> Iterator[None]:
    """SIGINT and SIGTERM call `flag`, which says whether one came before: then the signal ends the program at once."""

    def handler(number: int, frame: Any) -> None:
        if flag():
            raise KeyboardInterrupt

    old: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
