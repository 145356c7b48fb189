"""A script for test_stopped_runs.py: short runs that are stopped, each in processes of its own.

torch is imported once; a run's processes are forked. For each process it prints a line of JSON.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import evaluate  # noqa: F401  every run needs it
import sklearn.datasets  # noqa: F401
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kdtoolkit import Callback, distill

torch.set_num_threads(1)
ROOT = Path(sys.argv[1])
RECIPE = Path(__file__).parents[2] / "recipes" / "train_teacher.py"
IMAGES = TensorDataset(torch.rand(96, 3, 16, 16), torch.arange(96) % 10)


class At(Callback):
    """Does something at an event: at a step, or while the run is prepared; notes the time."""

    def __init__(self, action, event="on_step_end", step=2):
        self.action, self.event, self.step = action, event, step

    def act(self):
        (ROOT / f"{case}.time").write_text(repr(time.time()))
        return self.action()

    def check(self, run):
        if self.event == "check":
            self.act()

    def on_losses(self, run, step, batch):
        if self.event == "on_losses" and run.clock.step == self.step:
            return {"extra": self.act() * step.losses["ce"]}
        return None

    def on_step_end(self, run, step):
        if self.event == "on_step_end" and run.clock.step == self.step:
            self.act()

    def on_fit_end(self, run):
        if self.event == "on_fit_end":
            self.act()


class SignalsInEvaluation(nn.Module):
    """A teacher; its first forward of a whole batch is its evaluation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        if len(x) > 8:
            kill(signal.SIGTERM)()
        return self.fc(x.mean((2, 3)))


def kill(number, times=1):
    def act():
        for _ in range(times):
            os.kill(os.getpid(), number)
        if number in (signal.SIGKILL, signal.SIGSTOP):
            time.sleep(60)

    return act


def fail():
    raise ValueError("image 7 cannot be read")


def run(name, *callbacks, **options):
    given = {
        "method": "none",
        "output_dir": ROOT / name,
        "max_steps": 12,
        "num_workers": 0,
    } | options
    distill(
        given.pop("teacher", None), "cifar_resnet8", {"train": IMAGES, "test": IMAGES},
        num_classes=10, batch_size=32, validation="none", report_to="none",
        progress="off", callbacks=callbacks, **given,
    )  # fmt: skip


def recipe():
    """A recipe that is stopped when its first checkpoint is there."""
    last = ROOT / "recipe" / "checkpoints" / "last"
    words = "--model cifar_resnet8 --dataset digits --epochs 999 --batch-size 512"
    sys.argv = ["train_teacher.py", *words.split(), "--output", str(ROOT / "recipe")]

    def wait_and_stop():
        while not last.exists():
            time.sleep(0.05)
        kill(TERM)()

    threading.Thread(target=wait_and_stop, daemon=True).start()
    runpy.run_path(str(RECIPE), run_name="__main__")


def signal_all():
    """What a batch scheduler does: SIGTERM to this process and to its workers."""
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    processes = [str(process.pid) for process in workers]
    subprocess.run(["kill", "-TERM", *processes, str(os.getpid())], check=True)
    time.sleep(0.2)
    assert all(process.is_alive() for process in workers)


TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
ONE = {
    "loop-term": lambda: run("loop-term", At(kill(TERM))),
    "loop-hup": lambda: run("loop-hup", At(kill(HUP))),
    "prepared-int": lambda: run("prepared-int", At(kill(INT), "check")),
    "no-folder": lambda: run("", At(kill(INT)), output_dir=None),
    "workers": lambda: run("workers", At(signal_all), num_workers=2),
    "twice": lambda: run("twice", At(kill(TERM, times=2), step=4)),
    "prepared": lambda: run("prepared", At(kill(HUP), "check")),
    "teacher": lambda: run("teacher", teacher=SignalsInEvaluation(), method="kd"),
    "trained": lambda: run("trained", At(kill(TERM), "on_fit_end")),
    "ignored": lambda: run("ignored", At(kill(HUP)), max_steps=3, output_dir=None),
    "go-on": lambda: run("prepared", resume="auto", max_steps=1),
    "recipe": recipe,
}


def on_rank(rank, callback):
    return [callback] if os.environ["RANK"] == str(rank) else []


TWO = {
    "killed": lambda: run("killed", *on_rank(1, At(kill(signal.SIGKILL))), rank_timeout=30),
    "killed-0": lambda: run("killed-0", *on_rank(0, At(kill(signal.SIGKILL))), rank_timeout=30),
    "image": lambda: run("image", *on_rank(1, At(fail))),
    "nan": lambda: run("nan", *on_rank(0, At(lambda: float("nan"), "on_losses"))),
    "stopped": lambda: run("stopped", *on_rank(1, At(kill(signal.SIGSTOP))), rank_timeout=3),
    "stopped-0": lambda: run("stopped-0", *on_rank(0, At(kill(signal.SIGSTOP))), rank_timeout=3),
    "signal": lambda: run("signal", *on_rank(1, At(kill(TERM), "check"))),
    "both": lambda: run("both", At(fail)),
    "fine": lambda: run("fine", max_steps=3, output_dir=None),
}


def start(name, rank, world, port):
    """Fork one process of a run; returns its id in the parent, and never in the child."""
    process = os.fork()
    if process:
        return process
    for stream, kind in ((1, "out"), (2, "err")):
        path = ROOT / f"{name}.{rank}.{kind}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    for number in (TERM, HUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(INT, signal.default_int_handler)
    if name == "ignored":
        signal.signal(HUP, signal.SIG_IGN)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    raise Run(name)


class Run(Exception):
    """Leaves the parent's loop in a child."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def watch(name, world):
    """Start a run, wait for its processes, print how each ended; a stopped one is killed."""
    port = free_port()
    processes = {start(name, rank, world, port): rank for rank in range(world)}
    stopped = f"{name[-1:] if name[-2:] == '-0' else 1}" if name.startswith("stopped") else None
    while processes:
        for process, rank in list(processes.items()):
            if str(rank) == stopped and len(processes) == 1:
                os.kill(process, signal.SIGKILL)
            found, status = os.waitpid(process, os.WNOHANG)
            if not found:
                continue
            del processes[process]
            texts = {k: (ROOT / f"{name}.{rank}.{k}").read_text() for k in ("out", "err")}
            code = os.waitstatus_to_exitcode(status)
            noted = ROOT / f"{name}.time"
            seconds = time.time() - float(noted.read_text()) if noted.exists() else None
            facts = {"name": name, "rank": rank, "code": code, "seconds": seconds}
            print(json.dumps(facts | texts), flush=True)
        time.sleep(0.05)


CASES = ONE | TWO
run("nothing", dry_run=True)  # imports what a run needs
gc.freeze()
try:
    for case in sys.argv[2:] or CASES:
        watch(case, 2 if case in TWO else 1)
except Run as chosen:
    case = chosen.args[0]
else:
    sys.exit()
if case in ONE:
    CASES[case]()
    sys.exit()
try:
    CASES[case]()
except BaseException:  # as Python ends, without its second of cleaning up
    error = sys.exc_info()
    try:
        sys.excepthook(*error)
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(1)
os._exit(0)
