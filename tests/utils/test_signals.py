"""Handlers of stop signals: set, restored, left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from accelerate import Accelerator

from kdtoolkit.trainer.stop_signal import StopSignal
from kdtoolkit.utils import quiet_exit
from kdtoolkit.utils.signals import (
    STOP_SIGNALS,
    Interrupted,
    WorkerStart,
    by_signal,
    explain_interruption,
    handle_stop_signals,
    interrupt_on_stop_signals,
)


@pytest.fixture(autouse=True)
def keep_handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hook = sys.excepthook
    yield
    sys.excepthook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_is_an_exception_and_the_users_handler_returns(number, code):
    number = signal.Signals[number]
    mine = lambda *_: None  # noqa: E731
    signal.signal(number, mine)
    with pytest.raises(Interrupted) as caught, interrupt_on_stop_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) is mine
    assert caught.value.exit_code == code
    assert caught.value.signal_number == number
    assert str(caught.value) == f"stopped{by_signal(number)}"
    assert isinstance(caught.value, KeyboardInterrupt)


def test_inner_handlers_replace_outer_ones_and_all_return():
    before, seen = handlers(), []
    with interrupt_on_stop_signals():
        outer = handlers()
        with handle_stop_signals(seen.append):
            signal.raise_signal(signal.SIGTERM)
        assert handlers() == outer
    assert seen == [signal.SIGTERM]
    assert handlers() == before


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupt_on_stop_signals():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_another_thread_changes_no_handler():
    before, seen = handlers(), []

    def work():
        with interrupt_on_stop_signals():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number, code", [("SIGTERM", -15), ("SIGHUP", 7), ("SIGINT", 7)])
def test_a_forked_process_leaves_signals_to_its_parent(number, code):
    with interrupt_on_stop_signals():
        process = os.fork()
        if not process:
            try:
                signal.raise_signal(signal.Signals[number])
            finally:
                os._exit(7)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == code


def work(ready, called):
    WorkerStart(called.append)(3)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.raise_signal(number)
    ready.send(called)
    while True:
        time.sleep(60)


@pytest.fixture
def worker():
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(there, []), daemon=True)
    process.start()
    assert here.poll(60) and here.recv() == [3]
    yield process
    process.kill()
    process.join()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_outlive_the_first_sigterm_of_others(worker):
    kill = ["kill", "-TERM", str(worker.pid)]  # as a batch scheduler sends it
    subprocess.run(kill, check=True)
    worker.join(0.5)
    assert worker.is_alive()
    subprocess.run(kill, check=True)
    worker.join(60)
    assert worker.exitcode == 143


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_ends_when_its_main_process_ends_it(worker):
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 143


def test_a_message_is_completed_once():
    inner = explain_interruption(lambda: "inside; nothing was saved")
    outer = explain_interruption(lambda: "outside")
    with pytest.raises(Interrupted) as caught, outer, inner:
        raise Interrupted("", signal.SIGTERM)
    assert str(caught.value) == "stopped by SIGTERM inside; nothing was saved"


@pytest.mark.parametrize("launched", [False, True])
def test_the_second_signal_ends_at_once_but_a_launchers_copy_does_not(launched, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    stop = StopSignal(Accelerator(cpu=True), grad_accum=1)
    stop.receive(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    if launched:
        stop.receive(signal.SIGTERM)
        stop._received_at -= 60
    with pytest.raises(Interrupted):
        stop.receive(signal.SIGTERM)


@pytest.mark.parametrize("is_interactive", [False, True])
def test_an_uncaught_interruption_prints_its_message_and_sets_the_code(
    is_interactive, capsys, monkeypatch
):
    if is_interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    passed_on = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: passed_on.append(error))
    quiet_exit.show_without_traceback()
    hook = sys.excepthook
    quiet_exit.show_without_traceback()
    assert sys.excepthook is hook  # once
    stop = Interrupted("stopped; saved", signal.SIGHUP)
    if is_interactive:
        hook(type(stop), stop, None)
    else:
        with pytest.raises(SystemExit) as ended:
            hook(type(stop), stop, None)
        assert ended.value.code == 129
    assert capsys.readouterr().err == "kdtoolkit: stopped; saved\n"
    error = ValueError("other")
    hook(ValueError, error, None)
    assert passed_on == [(ValueError, error, None)]
