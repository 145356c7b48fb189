"""Every process of a run learns which other one failed, ended or answers no more, and why.

Rank 0 is connected with every other rank. A thread of each process sends a sign of life every
second and reads those of the others; collectives are not used, so that a process that waits in one
learns of a failure too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kdtoolkit.utils import distributed
from kdtoolkit.utils.quiet_exit import QuietExit, show, show_without_traceback
from kdtoolkit.utils.rank_link import Message, RankLink, connect, listen
from kdtoolkit.utils.signals import Interrupted, by_signal, resend

BEAT = 1.0  # seconds between two signs of life
SETTLE = 0.7  # seconds in which other ranks may fail by themselves, of the same error
LINGER = 2.0  # seconds that a failed rank waits until the others know why
GRACE = 5.0  # seconds after which a rank that cannot raise an error is ended
MAX_REASON = 500  # characters
ENDED = "ended without a message: it was killed, by hand or for want of memory"
LOST_CONNECTION = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|process ?group|broken pipe|socket", re.IGNORECASE
)
logger = logging.getLogger(__name__)


class RankFailed(RuntimeError, QuietExit):
    """Another process of the run failed, ended or answers no more.

    Args:
        message: Which one, why, and how to continue.
        rank: Its rank.

    Attributes:
        rank: Rank of the process that failed.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Failure:
    """What happened to a rank.

    Attributes:
        rank: The rank.
        what: Phrase of which the rank is the subject.
        signal_number: The signal that stopped it; 0 where it failed.
    """

    rank: int
    what: str
    signal_number: int = 0

    def as_error(self) -> RankFailed | Interrupted:
        """The error of a rank that ends because of it."""
        if self.signal_number:
            return Interrupted("", self.signal_number)
        return RankFailed(
            f"rank {distributed.rank()} of {distributed.world_size()} stops: rank {self.rank} "
            f"{self.what}. Continue from the last checkpoint with resume='auto'",
            self.rank,
        )


class RankMonitor:
    """The thread of one process, and its connections.

    Args:
        timeout: Seconds without a sign of life after which a rank is given up.
        links: Connections that are open already: of a rank other than 0 that to rank 0.
        listener: Of rank 0: the socket to which the others connect.
        token: What a process has to say that connects.

    Attributes:
        failure: The first failure of another rank; None before.
    """

    def __init__(
        self, timeout: float, links: list[RankLink], listener: socket.socket | None, token: str
    ) -> None:
        self.timeout, self.links, self.listener, self.token = timeout, links, listener, token
        self.failure: Failure | None = None
        self._noted_at = 0.0
        self._noted = threading.Event()
        self._is_leaving = self._is_closed = self._is_shown = False
        self._interval = min(BEAT, timeout / 4)
        self._selector = selectors.DefaultSelector()
        for link in links:
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._watch, name="rank monitor", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- of the main thread
    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails, unless it does so because of another.

        Args:
            error: Why.
        """
        if self._is_leaving:
            return
        if is_lost_connection(error):
            self._noted.wait(LINGER + BEAT)  # the reason comes a little later than the end
        if self.failure is not None:
            return
        self._is_leaving = True
        number = error.signal_number if isinstance(error, Interrupted) else 0
        if isinstance(error, Interrupted) and error.on_all_ranks:
            self._send({"left": True})
            return
        what = f"was stopped{by_signal(number)}" if number else f"failed: {describe(error)}"
        self._send({"failed": distributed.rank(), "what": what, "signal": number})

    def failure_behind(self, error: BaseException) -> Failure | None:
        """The failure of another rank because of which this one has an error, or None.

        Args:
            error: The error of this rank.
        """
        if self._is_leaving or self.failure is None:
            return None
        follows = isinstance(error, (RankFailed, KeyboardInterrupt)) or is_lost_connection(error)
        return self.failure if follows else None

    def close(self) -> None:
        """Leave: the other ranks no longer wait for a sign of life of this one."""
        if not self._is_leaving:
            self._send({"left": True})
        self._is_leaving = True
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and not all(link.has_left for link in self.links):
            time.sleep(0.01)
        self._is_closed = True
        self._thread.join()
        self.forget()

    def forget(self) -> None:
        """Close the sockets of this process; those of a process that forked it stay open."""
        for key in list(self._selector.get_map().values()):
            end = self.listener if key.data is None else key.data
            if end is not None:
                end.close()
        self._selector.close()

    def show_failure(self, error: BaseException) -> None:
        """Print the other rank's failure once, whether this or the main thread is first."""
        error.is_shown = error.is_shown or self._is_shown  # type: ignore[attr-defined]
        self._is_shown = True
        show(error)
        error.is_shown = True  # type: ignore[attr-defined]

    # ---------------------------------------------------------------------------- of the own thread
    def _watch(self) -> None:
        beat_at = 0.0
        while not self._is_closed:
            before = time.monotonic()
            wait = 0.05 if self._is_leaving else self._interval
            for key, _ in self._selector.select(wait):
                self._read(key.data)
            now = time.monotonic()
            if now - before > wait + self.timeout / 4:
                self._excuse_all(now)  # this process itself was stopped, as perhaps all were
            if now - beat_at >= self._interval:
                beat_at = now
                self._send({})
            self._check_signs_of_life(now)
            if self.failure is not None:
                self._end_main_thread(self.failure, now - self._noted_at)

    def _read(self, link: RankLink | None) -> None:
        if link is None:
            assert self.listener is not None
            with contextlib.suppress(OSError):
                link = RankLink(self.listener.accept()[0], rank=None)
                self._selector.register(link.socket, selectors.EVENT_READ, link)
            return
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link.socket)
            link.close()
            if link.rank is not None and not link.has_left:
                link.has_left = True
                self._note(Failure(link.rank, ENDED))
            return
        for message in messages:
            self._take(link, message)

    def _take(self, link: RankLink, message: Message) -> None:
        if link.rank is None:
            if message.get("token") == self.token and isinstance(message.get("rank"), int):
                link.rank = message["rank"]
                self.links.append(link)
            return
        if "left" in message:
            link.has_left = True
        elif "failed" in message:
            rank = int(message["failed"])
            link.has_left = link.has_left or rank == link.rank
            self._note(Failure(rank, str(message["what"]), int(message["signal"])))

    def _note(self, failure: Failure) -> None:
        """Keep the first failure, and pass it on."""
        if self.failure is not None or self._is_leaving:
            return
        self.failure, self._noted_at = failure, time.monotonic()
        self._noted.set()
        if failure.signal_number:
            resend(failure.signal_number)
        self._send({"failed": failure.rank, "what": failure.what, "signal": failure.signal_number})

    def _send(self, message: Message) -> None:
        for link in list(self.links):
            link.send(message)

    def _excuse_all(self, now: float) -> None:
        for link in self.links:
            link.last_heard = now

    def _check_signs_of_life(self, now: float) -> None:
        for link in self.links:
            if not link.has_left and now - link.last_heard > self.timeout:
                link.has_left = True
                assert link.rank is not None
                what = (
                    f"has not answered for {self.timeout:g} s (rank_timeout={self.timeout:g}): it "
                    "is stopped, or its machine cannot be reached"
                )
                self._note(Failure(link.rank, what))

    def _end_main_thread(self, failure: Failure, seconds: float) -> None:
        """Say why this rank ends; end it where its main thread waits for a rank that is gone."""
        error = failure.as_error()
        is_due = seconds > SETTLE and not self._is_leaving and not self._is_shown
        if is_due and isinstance(error, RankFailed):
            self.show_failure(error)
        if seconds > GRACE:
            self.show_failure(error)
            sys.stdout.flush()
            os._exit(error.exit_code)


_active: RankMonitor | None = None


def _forget_in_child() -> None:
    """A forked worker keeps no connection open for its parent."""
    global _active
    if _active is not None:
        _active.forget()
        _active = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def watch_ranks(timeout: float, device: torch.device) -> Iterator[None]:
    """Context in which a failure of one rank ends the others too, with a message that names it.

    All ranks enter it. In a run of one process, and inside of another such context, it does
    nothing.

    Args:
        timeout: Seconds after which a rank is given up that gives no sign of life.
        device: Device for the exchange of addresses.

    Raises:
        RankFailed: If another rank failed, ended or answers no more. Where this process waits in a
            collective that cannot be ended, it prints the message and exits with code 1.
        Interrupted: If a signal stopped another rank alone.
    """
    global _active
    if _active is not None or not distributed.is_distributed():
        yield
        return
    monitor = _active = _start(timeout, device)
    try:
        yield
    except BaseException as error:
        monitor.report(error)
        failure = monitor.failure_behind(error)
        if failure is None:
            _add_rank(error)
            raise
        own = failure.as_error()
        if isinstance(own, RankFailed):
            monitor.show_failure(own)
        show_without_traceback()
        raise own from error
    finally:
        _active = None
        monitor.close()


def _start(timeout: float, device: torch.device) -> RankMonitor:
    listener: socket.socket | None = None
    offer: list[Any] = [None]
    if distributed.rank() == 0:
        listener, host = listen()
        offer = [(host, listener.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(offer, src=0, device=device if device.type != "cpu" else None)
    host, port, token = offer[0]
    links = []
    if listener is None:
        try:
            links = [connect(host, port, {"token": token, "rank": distributed.rank()})]
        except OSError as error:
            logger.warning(
                "rank %d cannot connect to %s, port %d (%s): where a rank fails, the others end "
                "only with the timeout of the backend", distributed.rank(), host, port, error,
            )  # fmt: skip
    return RankMonitor(timeout, links, listener, token)


def report_failure(error: BaseException) -> None:
    """Tell the other ranks at once that this one fails, before it cleans up.

    Args:
        error: Why.
    """
    if _active is not None:
        _active.report(error)


def raise_if_rank_failed() -> None:
    """End this rank where another has failed; costs nothing else.

    Raises:
        RankFailed: If another rank failed.
        Interrupted: If a signal stopped another rank alone.
    """
    if _active is not None and _active.failure is not None:
        raise _active.failure.as_error()


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a collective without the other rank.

    Args:
        error: The error.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError):
            return True
        if isinstance(found, RuntimeError) and LOST_CONNECTION.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def describe(error: BaseException) -> str:
    """Type and message of an error, in a line.

    Args:
        error: The error.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " ..."


def _add_rank(error: BaseException) -> None:
    """Let the traceback say on which rank it was raised."""
    if sys.version_info >= (3, 11) and not isinstance(error, Interrupted):
        error.add_note(f"raised on rank {distributed.rank()} of {distributed.world_size()}")
