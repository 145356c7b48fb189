"""SIGINT (Ctrl-C), SIGTERM and SIGHUP as requests to stop."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from kdtoolkit.utils.quiet_exit import QuietExit, show_without_traceback

SignalHandler: TypeAlias = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

# SIGHUP does not exist everywhere
STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
)
EXIT_CODE_BASE = 128  # a shell's exit code for a signal: 130 SIGINT, 143 SIGTERM, 129 SIGHUP
_handling: list[int] = []  # one entry for each context that is open
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


class Interrupted(KeyboardInterrupt, QuietExit):
    """A signal stopped the run; the message says what was saved and how to continue.

    A script that does not catch it prints the message and ends with `exit_code`.

    Args:
        message: Where the run stopped, what was saved, how to continue; "" until it is known.
        signal_number: The signal; 0 where none came.
        saved: Folder of the checkpoint that was written.
        on_all_ranks: Whether every process of the run stops at the same step.

    Attributes:
        signal_number: The signal; 0 where none came.
        saved: Folder of the checkpoint that was written, or None.
        on_all_ranks: Whether every process of the run stops at the same step.
        exit_code: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(
        self,
        message: str = "",
        signal_number: int = 0,
        saved: Path | None = None,
        on_all_ranks: bool = False,
    ) -> None:
        super().__init__(message)
        self.signal_number, self.saved, self.on_all_ranks = signal_number, saved, on_all_ranks
        self.exit_code = EXIT_CODE_BASE + (signal_number or signal.SIGINT)

    def __str__(self) -> str:
        return str(self.args[0]) or f"stopped{by_signal(self.signal_number)}"


def by_signal(number: int) -> str:
    """Phrase that names a signal.

    Args:
        number: The signal; 0 where none came.

    Returns:
        " by Ctrl-C", " by SIGTERM", ...; "" without a signal.
    """
    if not number:
        return ""
    return " by Ctrl-C" if number == signal.SIGINT else f" by {signal.Signals(number).name}"


@contextlib.contextmanager
def handle_stop_signals(handle: Callable[[int], object]) -> Iterator[None]:
    """Context in which SIGINT, SIGTERM and SIGHUP call a function; then the old handlers return.

    Only the main thread may set handlers; in another one nothing is changed. A signal that is
    ignored, such as SIGHUP under nohup, stays ignored. Of processes that are forked inside, SIGTERM
    ends them as ever, and the other two, which a terminal sends to all, are left to this process.

    Args:
        handle: Called in the main thread with the number of the signal; it may raise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(number)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    previous: dict[signal.Signals, SignalHandler] = {}
    _handling.append(owner)
    try:
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: it was not set by Python
                previous[number] = before
                signal.signal(number, receive)
        yield
    finally:
        _handling.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def resend(number: int) -> None:
    """Give this process a signal that another process of the run got; from any thread.

    Args:
        number: The signal. Without an effect outside of `handle_stop_signals`.
    """
    if _handling:
        signal.raise_signal(number)


@contextlib.contextmanager
def interrupt_on_stop_signals() -> Iterator[None]:
    """Context in which a stop signal raises `Interrupted` at once, which ends a script quietly.

    Raises:
        Interrupted: At a signal; without a message.
    """

    def handle(number: int) -> None:
        raise Interrupted(signal_number=number)

    try:
        with handle_stop_signals(handle):
            yield
    except Interrupted:
        show_without_traceback()
        raise


@contextlib.contextmanager
def explain_interruption(describe: Callable[[], str]) -> Iterator[None]:
    """Context that completes the message of an `Interrupted` that has none.

    Args:
        describe: Returns where the run stopped, what is kept and how to continue; called after the
            signal.

    Raises:
        Interrupted: The same, with a message.
    """
    try:
        yield
    except Interrupted as stop:
        if not stop.args[0]:
            stop.args = (f"stopped{by_signal(stop.signal_number)} {describe()}",)
        raise


@dataclass(frozen=True)
class WorkerStart:
    """`worker_init_fn` of a DataLoader whose workers outlive a stop signal that is sent to all.

    Batch schedulers and terminals signal every process of a job. Workers leave the first signal to
    the main process, which saves and ends them; a second SIGTERM ends a worker, and so does the
    first where the main process sends it (where the system says who sent it: Linux, BSD).

    Args:
        own: The `worker_init_fn` that is called besides.
    """

    own: Callable[[int], object] | None = None

    def __call__(self, worker: int) -> None:
        """Set the handlers of this worker.

        Args:
            worker: Number of the worker.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()
        else:
            signal.signal(signal.SIGTERM, _expect_second)
        if self.own is not None:
            self.own(worker)


def _wait_for_end(parent: int) -> None:
    """End this process at a SIGTERM of its parent, or at the second one."""
    senders: list[int] = []
    while parent not in senders and len(senders) < 2:
        senders.append(signal.sigwaitinfo({signal.SIGTERM}).si_pid)
    os._exit(EXIT_CODE_BASE + signal.SIGTERM)


def _expect_second(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def follow_launcher() -> None:
    """Let SIGTERM come when `accelerate launch` ends.

    For a single process it waits for its child and forwards no signals; torchrun does. Elsewhere
    than on Linux, and under another parent, nothing is changed.
    """
    if sys.platform == "linux" and _is_started_by_accelerate():
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)


def _is_started_by_accelerate() -> bool:
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return False
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    names = [os.path.basename(word) for word in words[:4]]
    return any(
        n in ("accelerate", "accelerate-launch") or "accelerate.commands" in n for n in names
    )
