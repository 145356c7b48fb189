"""What a process learns of the others: over real sockets, both ends in this process."""

from __future__ import annotations

import signal
import socket
import time

import pytest
import torch.distributed as dist

from kdtoolkit.utils import rank_monitor
from kdtoolkit.utils.rank_link import RankLink, connect, listen
from kdtoolkit.utils.rank_monitor import Failure, RankFailed, RankMonitor, is_lost_connection
from kdtoolkit.utils.signals import Interrupted

TOKEN = "secret"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    listener, host = listen()
    assert host == "127.0.0.1"  # one machine: no port is open to others
    monitor = RankMonitor(0.4, [], listener, TOKEN)
    yield monitor
    for link in monitor.links:
        link.has_left = True
    monitor.close()


def join(hub: RankMonitor, token: str = TOKEN) -> RankLink:
    return connect("127.0.0.1", hub.listener.getsockname()[1], {"token": token, "rank": 1})


def wait(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_silent_rank_is_given_up(hub, capsys):
    link = join(hub)
    wait(lambda: hub.failure)
    assert hub.failure.rank == 1
    assert "has not answered for 0.4 s (rank_timeout=0.4)" in hub.failure.what
    assert any("failed" in message for message in link.receive())  # it hears so if it wakes
    error = hub.failure.as_error()
    assert isinstance(error, RankFailed)
    assert "rank 1 has not answered" in str(error)
    assert "resume='auto'" in str(error)
    assert hub.failure_behind(RuntimeError("Connection closed by peer")) is hub.failure
    assert hub.failure_behind(ValueError("its own")) is None
    link.close()


def test_a_rank_that_dies_is_noticed_at_once(hub):
    link = join(hub)
    wait(lambda: hub.links)
    link.close()
    wait(lambda: hub.failure)
    assert "ended without a message" in hub.failure.what


def test_a_rank_that_leaves_did_not_fail(hub):
    link = join(hub)
    wait(lambda: hub.links)
    link.send({"left": True})
    link.close()
    wait(lambda: hub.links[0].has_left)
    time.sleep(0.6)
    assert hub.failure is None


def test_a_signal_of_another_rank_is_an_interruption():
    error = Failure(1, "was stopped by SIGTERM", signal.SIGTERM).as_error()
    assert isinstance(error, Interrupted)
    assert error.exit_code == 143


def test_strangers_are_not_heard(hub):
    stranger = join(hub, token="guess")
    stranger.send({"failed": 1, "what": "nonsense", "signal": 0})
    noisy = socket.create_connection(("127.0.0.1", hub.listener.getsockname()[1]))
    noisy.sendall(b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(0.3)
    stranger.close()
    noisy.close()
    time.sleep(0.3)
    assert hub.failure is None
    assert hub.links == []


def test_only_an_error_of_a_collective_is_another_ranks():
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    wrapped = ValueError("could not write the checkpoint")
    wrapped.__cause__ = closed
    for error in (closed, wrapped, dist.DistBackendError("timeout")):
        assert is_lost_connection(error)
    for error in (ValueError("image 7"), RuntimeError("sizes differ"), KeyError("gloo")):
        assert not is_lost_connection(error)


def test_without_other_processes_there_is_no_monitor():
    with rank_monitor.watch_ranks(1.0, None):
        assert rank_monitor._active is None
        rank_monitor.raise_if_rank_failed()
