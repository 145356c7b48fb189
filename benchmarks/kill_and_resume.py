"""Kill a run at random moments, resume it each time, and compare it with a run that was not killed.

    python benchmarks/kill_and_resume.py --methods kd srkd dkel dcl --kills 20
    python benchmarks/kill_and_resume.py --methods kd --kills 20 --ranks 2
    python benchmarks/kill_and_resume.py --methods kd --kills 20 --first-write

A run is killed by SIGKILL, every rank of it, and started again with resume="auto". With
`--first-write` every kill hits another new run while its first checkpoint is being written.
Compared are the weights of the student, bit for bit, and the rows of metrics.jsonl but for times.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from kdtoolkit import distill

TIMES = ("images_per_s", "latency_ms", "teacher_latency_ms", "latency_ratio", "compression",
         "compression_score")  # fmt: skip
TRAIN = {"train_limit": 128, "batch_size": 32, "log_every": 3, "num_workers": 0, "progress": "off"}
WITH_TEACHER = {"kd", "srkd", "sokd"}
POLL = 0.0005  # seconds between two looks at a folder
LIMIT = 300.0  # seconds that one start may take


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        method: Name of the method.
        teacher: Folder of the teacher; None for a method without one.
        folder: Output folder.
        epochs: Length.
        ranks: Processes.
    """

    method: str
    teacher: Path | None
    folder: Path
    epochs: int
    ranks: int


def train(job: Job) -> None:
    torch.set_num_threads(1)
    distill(
        None if job.teacher is None else str(job.teacher), "cifar_resnet8", "digits",
        method=job.method, epochs=job.epochs, output_dir=job.folder, resume="auto", **TRAIN,
    )  # fmt: skip


def start(job: Job) -> list[int]:
    """Start the run in new processes; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(job, rank, port) for rank in range(job.ranks)]


def _fork(job: Job, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(job.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job.ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks),
                LOCAL_WORLD_SIZE=str(job.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                ACCELERATE_USE_CPU="true",
            )  # fmt: skip
        train(job)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def kill(processes: list[int]) -> bool:
    """Kill the processes; whether any of them was still running."""
    running = [os.waitpid(process, os.WNOHANG)[0] == 0 for process in processes]
    for process, is_running in zip(processes, running, strict=True):
        if is_running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return any(running)


def finish(job: Job, processes: list[int]) -> None:
    """Wait for the processes of a run to end well."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(statuses):
        sys.exit(f"{job.folder} failed:\n{job.folder.with_suffix('.log').read_text()}")


def result_of(folder: Path) -> dict[str, Any]:
    """Checksum of the student's weights, and the rows without times."""
    weights = load_file(folder / "student" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return {"weights": digest.hexdigest(), "rows": kept}


def wait_until(condition: Callable[[], bool], processes: list[int]) -> None:
    """Wait for a condition, or until a process has ended."""
    end = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < end:
        for process in processes:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
        time.sleep(POLL)


def kill_in_a_row(job: Job, kills: int, draw: random.Random, seconds: float) -> int:
    """Kill the run `kills` times, then let it end; how often it was running when it was killed."""
    done = 0
    rows = job.folder / "metrics.jsonl"
    for _ in range(kills):
        before = rows.stat().st_mtime_ns if rows.exists() else 0
        processes = start(job)
        if draw.random() < 0.75:  # else while it starts
            wait_until(lambda b=before: rows.exists() and rows.stat().st_mtime_ns != b, processes)
        time.sleep(draw.uniform(0, 3 * seconds / job.epochs))
        done += kill(processes)
    finish(job, start(job))
    return done


def kill_first_write(job: Job, draw: random.Random) -> str:
    """Kill a new run while it writes its first checkpoint, and resume it; what was left behind."""
    checkpoints = job.folder / "checkpoints"
    processes = start(job)
    wait_until(lambda: (checkpoints / ".last.tmp").exists(), processes)
    time.sleep(draw.uniform(0, 0.012))
    kill(processes)
    left = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
    finish(job, start(job))
    return " ".join(left) or "nothing"


def make_teacher(root: Path) -> Path:
    folder = root / "teacher"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            distill(
                None, "cifar_resnet8", "digits", method="none", epochs=10, batch_size=64,
                num_workers=0, progress="off", output_dir=folder,
            )  # fmt: skip
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return folder / "student"


def compare(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """What differs; empty where nothing does."""
    if found["weights"] != expected["weights"]:
        return "the weights differ"
    if len(found["rows"]) != len(expected["rows"]):
        return f"{len(found['rows'])} rows in place of {len(expected['rows'])}"
    pairs = zip(found["rows"], expected["rows"], strict=True)
    return next((f"rows differ: {a} and {b}" for a, b in pairs if a != b), "")


def check_method(method: str, args: argparse.Namespace, root: Path) -> bool:
    """Run one method without and with kills; whether both give the same."""
    teacher = root / "teacher" / "student" if method in WITH_TEACHER else None
    straight = Job(method, teacher, root / f"{method}-straight", args.epochs, args.ranks)
    begin = time.monotonic()
    finish(straight, start(straight))
    seconds = time.monotonic() - begin
    expected = result_of(straight.folder)
    draw = random.Random(f"{args.seed} {method} {args.ranks}")
    good, left = 0, []
    if args.first_write:
        for number in range(args.kills):
            job = Job(method, teacher, root / f"{method}-{number}", args.epochs, args.ranks)
            left.append(kill_first_write(job, draw))
            good += not compare(expected, result_of(job.folder))
            shutil.rmtree(job.folder)
        states = {state: left.count(state) for state in sorted(set(left))}
        print(f"{method}: {good} of {args.kills} go on to the same; left behind: {states}")
        return good == args.kills
    job = Job(method, teacher, root / f"{method}-killed", args.epochs, args.ranks)
    killed = kill_in_a_row(job, args.kills, draw, seconds)
    difference = compare(expected, result_of(job.folder))
    rows = len(expected["rows"])
    print(
        f"{method}, {args.ranks} rank(s), {args.epochs} epochs: killed {killed} times; "
        f"{difference or f'weights are bit for bit the same, {rows} rows of metrics are equal'}",
        flush=True,
    )
    return not difference and killed == args.kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["kd", "srkd", "dkel", "dcl"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--first-write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if WITH_TEACHER & set(args.methods):
            make_teacher(root)
        good = [check_method(method, args, root) for method in args.methods]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
