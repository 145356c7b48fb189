"""A connection between two processes of a run that carries short JSON messages."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

SEND_TIMEOUT = 2.0  # seconds; a stopped process reads nothing
CONNECT_TIMEOUT = 20.0  # seconds
MAX_LINE = 1 << 16  # bytes of a message


class RankLink:
    """One end of a connection.

    Args:
        connection: The connected socket.
        rank: Rank of the other end; None until it has said so.

    Attributes:
        rank: Rank of the other end, or None.
        last_heard: Time (monotonic, seconds) at which the other end last sent something.
        has_left: Whether the other end has said that it leaves, or that it failed.
    """

    def __init__(self, connection: socket.socket, rank: int | None) -> None:
        connection.settimeout(SEND_TIMEOUT)
        self.socket, self.rank = connection, rank
        self.last_heard = time.monotonic()
        self.has_left = False
        self._lock = threading.Lock()
        self._unread = b""

    def send(self, message: Message) -> None:
        """Send a message; an end that is gone is noticed where it is read.

        Args:
            message: Plain values; {} only says that this process is alive.
        """
        line = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(line)

    def receive(self) -> list[Message] | None:
        """Read what has come.

        Returns:
            Whole messages; None where the other end is closed or sends what is no message.
        """
        try:
            data = self.socket.recv(MAX_LINE)
        except OSError:
            return None
        if not data:
            return None
        self.last_heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        if len(self._unread) > MAX_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def listen() -> tuple[socket.socket, str]:
    """Open a port for the other ranks.

    Returns:
        The listening socket, and the host under which others find it: only this machine where all
        ranks run on it.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None and world == os.environ.get("LOCAL_WORLD_SIZE"):
        return socket.create_server(("127.0.0.1", 0)), "127.0.0.1"
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if socket.has_dualstack_ipv6():
        found = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        return found, host
    return socket.create_server(("", 0)), host


def connect(host: str, port: int, hello: Message) -> RankLink:
    """Connect to rank 0.

    Args:
        host: Its host.
        port: Its port.
        hello: The first message, which says who connects.

    Returns:
        The connection.

    Raises:
        OSError: If it cannot be reached.
    """
    link = RankLink(socket.create_connection((host, port), CONNECT_TIMEOUT), rank=0)
    link.send(hello)
    return link
