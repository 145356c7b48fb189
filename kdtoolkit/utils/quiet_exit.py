"""Errors that end a script with their message and an exit code, without a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


class QuietExit:
    """Mixin for exceptions; `show_without_traceback` makes scripts end with `exit_code`.

    Attributes:
        exit_code: Exit code of a script that does not catch the exception.
        is_shown: Whether the message stands on stderr already.
    """

    exit_code = 1
    is_shown = False


def show(error: BaseException) -> None:
    """Print the message of an error to stderr, once.

    Args:
        error: The error; one that `is_shown` is not printed again.
    """
    if not getattr(error, "is_shown", False):
        print(f"kdtoolkit: {error}", file=sys.stderr, flush=True)


def show_without_traceback() -> None:
    """Let an uncaught `QuietExit` end the program with its message and its exit code.

    Other exceptions go to the hook that was there before. An interactive interpreter goes on.
    """
    previous = sys.excepthook
    if getattr(previous, "shows_quiet_exit", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, QuietExit):
            previous(kind, error, traceback)
            return
        show(error)
        if not (hasattr(sys, "ps1") or sys.flags.interactive):
            raise SystemExit(error.exit_code)

    hook.shows_quiet_exit = True  # type: ignore[attr-defined]
    sys.excepthook = hook
