"""Two real processes on the CPU (gloo) train what one process trains with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = '''
"""A user's script: the same under python and under torchrun."""
import json, os, signal, sys
from pathlib import Path

import torch
from torch import nn

from kdtoolkit import Callback, distill
from kdtoolkit.utils.signals import Interrupted

torch.set_num_threads(1)
root, stop, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]


class Net(nn.Module):
    """Without BatchNorm, whose statistics are those of one process."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.fc(self.two(self.one(x).relu()).relu().mean((2, 3)))


class StopAt(Callback):
    def on_step_end(self, run, step):
        # one rank gets the signal, both must stop
        if run.clock.step == stop and run.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


torch.manual_seed(1)
teacher = Net(16)
torch.manual_seed(2)
student = Net(8)
rank = os.environ.get("RANK", "0")
opened = set()


def watch(event, args):
    if event == "open" and any(letter in str(args[1]) for letter in "wax+"):
        opened.add(str(args[0]))


sys.addaudithook(watch)
try:
    result = distill(
        teacher, student, "digits", method="at", layers=[("two", "two")], epochs=3, batch_size=64,
        allow_weak_teacher=True,
        losses={"ce": 1.0, "kd": 0.5, "at": 100.0}, lr=0.1, momentum=0.9, log_every=2,
        num_workers=0, train_limit=256,
        output_dir=root / "run", resume=resume == "resume" and "auto", callbacks=[StopAt()],
    )
except Interrupted as error:
    print(f"rank {rank} interrupted: {error}", flush=True)
    os._exit(0)
facts = {
    "metrics": {k: v for k, v in result.metrics.items() if isinstance(v, (int, float, str))},
    "wrote": sorted(p for p in opened if str(root / "run") in p),
    "rows": len(result.history),
}
(root / f"rank{rank}.json").write_text(json.dumps(facts))
torch.save(result.student.state_dict(), root / f"rank{rank}.pt")
'''


def launch(root: Path, processes: int, stop: int = -1, resume: str = "no") -> str:
    """`python -m torch.distributed.run` on the script, or plain python; what it printed."""
    root.mkdir(exist_ok=True)
    script = root / "train.py"
    script.write_text(SCRIPT)
    runner = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, *runner, str(script), str(root), str(stop), resume]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def facts_of(root: Path, rank: int) -> dict:
    return json.loads((root / f"rank{rank}.json").read_text())


def rows(root: Path) -> list[dict]:
    return [json.loads(x) for x in (root / "run/metrics.jsonl").read_text().splitlines()]


def close(a: Path, b: Path) -> None:
    one, two = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_processes_train_what_one_trains(tmp_path):
    one, two, broken = tmp_path / "one", tmp_path / "two", tmp_path / "broken"
    assert "1 process on cpu, precision fp32, 12 steps" in launch(one, 1)
    printed = launch(two, 2)
    assert printed.count("2 processes on cpu, precision fp32, 12 steps") == 1  # one rank prints
    close(one / "rank0.pt", two / "rank0.pt")
    close(two / "rank0.pt", two / "rank1.pt")

    a, b = rows(one), rows(two)
    assert [(r["event"], r.get("split"), r["step"]) for r in a] == [
        (r["event"], r.get("split"), r["step"]) for r in b
    ]
    for x, y in zip(a, b, strict=True):
        for key in ("loss", "loss/ce", "loss/kd", "loss/at", "top1", "agreement"):
            if key in x:
                assert abs(x[key] - y[key]) < 2e-3 * max(abs(x[key]), 1.0), (
                    x["event"],
                    x["step"],
                    key,
                )

    timed = ("latency_ms", "teacher_latency_ms")
    first, second = (
        {k: v for k, v in facts_of(two, r)["metrics"].items() if k not in timed} for r in (0, 1)
    )
    assert first == second and facts_of(two, 0)["rows"] == facts_of(two, 1)["rows"] == len(b)

    wrote = facts_of(two, 1)["wrote"]
    assert all("random_states_1.pkl" in p for p in wrote), (
        wrote
    )  # each rank its own generator's state, nothing else
    assert any("metrics.jsonl" in p for p in facts_of(two, 0)["wrote"])

    # one rank gets a signal in the third epoch: both stop at the same step; then both continue
    printed = launch(broken, 2, stop=9)
    assert printed.count("interrupted: stopped at step 10 of 12") == 2
    launch(broken, 2, resume="resume")
    close(two / "rank0.pt", broken / "rank0.pt")
    steps = [(r["event"], r.get("split"), r["step"]) for r in rows(broken)]
    assert steps == [(r["event"], r.get("split"), r["step"]) for r in b]


def test_accelerate_launch_on_the_cpu_runs_one_process_and_the_run_says_so(tmp_path):
    """`--cpu` goes to accelerate's simple launcher, which uses --num_processes for mpirun alone."""
    root = tmp_path / "launch"
    root.mkdir()
    (root / "train.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(root / "train.py"), str(root), "-1", "no"],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "1 process on cpu" in done.stdout
