"""Runs that end before their time: signals, failures of a rank, launchers; in real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stopped_runs.py")
GO_ON = "continue with resume='auto'"
RANK_TIMEOUT = 3  # seconds, as in the script
LIMIT = 10  # seconds in which the other ranks end


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    own = {name: value for name, value in os.environ.items() if name not in names}
    fixed = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return own | fixed


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[tuple[str, int], dict]:
    """How every process of every case ended, by name and rank."""
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = map(json.loads, done.stdout.splitlines())
    return {(one["name"], one["rank"]): one for one in facts}


SIGNALS = {  # case -> exit code, message
    "loop-term": (143, f"at step 2 of 12 by SIGTERM; saved to .*/checkpoints/last; {GO_ON}"),
    "loop-hup": (129, f"at step 2 of 12 by SIGHUP; saved to .*/checkpoints/last; {GO_ON}"),
    "no-folder": (130, "at step 2 of 12 by Ctrl-C; nothing was saved: no output_dir was given"),
    "workers": (143, f"at step 2 of 12 by SIGTERM; saved to .*/checkpoints/last; {GO_ON}"),
    "twice": (143, rf"by SIGTERM at once; .*/last \(epoch 1, step 3\) is whole; {GO_ON}"),
    "prepared": (129, "by SIGHUP before training began; there was nothing to save; .*'auto'"),
    "prepared-int": (130, "by Ctrl-C before training began; there was nothing to save; .*'auto'"),
    "teacher": (143, "by SIGTERM before training began; there was nothing to save; .*'auto'"),
    "trained": (143, rf"by SIGTERM at once; .*/last \(epoch 4, step 12\) is whole; {GO_ON}"),
    "recipe": (143, f"by SIGTERM; saved to .*/checkpoints/last; {GO_ON}"),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_ends_a_script_with_one_line_and_its_code(case, ended):
    code, message = SIGNALS[case]
    one = ended[case, 0]
    assert one["code"] == code, one["err"]
    assert re.fullmatch(rf"kdtoolkit: stopped .*{message}\n", one["err"]), one["err"]


def test_an_ignored_signal_stays_ignored(ended):
    assert ended["ignored", 0]["code"] == 0, ended["ignored", 0]["err"]


def test_a_run_that_was_stopped_before_training_goes_on(ended):
    assert ended["go-on", 0]["code"] == 0, ended["go-on", 0]["err"]


FAILURES = {  # case -> rank that fails, what the other one says of it
    "killed": (1, "ended without a message"),
    "killed-0": (0, "ended without a message"),
    "image": (1, "failed: ValueError: image 7 cannot be read"),
    "nan": (0, "failed: NonFiniteLoss: the loss term 'extra' is not finite at step 2"),
    "stopped": (1, "has not answered for 3 s (rank_timeout=3)"),
    "stopped-0": (0, "has not answered for 3 s (rank_timeout=3)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_other_rank_ends_and_says_which_one_failed_and_why(case, ended):
    failed, why = FAILURES[case]
    other = ended[case, 1 - failed]
    assert other["code"] == 1, other["err"]
    message = f"kdtoolkit: rank {1 - failed} of 2 stops: rank {failed} {why}"
    assert other["err"].startswith(message), other["err"]
    assert other["err"].count("\n") == 1, other["err"]
    allowed = LIMIT + (RANK_TIMEOUT if case.startswith("stopped") else 0)
    assert other["seconds"] < allowed, other["seconds"]


@pytest.mark.parametrize("case", ["image", "nan"])
def test_the_rank_that_fails_raises_its_own_error_and_says_its_rank(case, ended):
    failed, why = FAILURES[case]
    own = ended[case, failed]
    assert own["code"] == 1
    assert why.removeprefix("failed: ") in own["err"]
    assert "stops: rank" not in own["err"]
    if sys.version_info >= (3, 11):
        assert f"raised on rank {failed} of 2" in own["err"]


def test_an_error_of_all_ranks_is_raised_by_each(ended):
    for rank in (0, 1):
        one = ended["both", rank]
        assert one["code"] == 1
        assert "ValueError: image 7 cannot be read" in one["err"]
        assert "stops: rank" not in one["err"]


def test_a_signal_to_one_rank_before_training_stops_both(ended):
    for rank in (0, 1):
        one = ended["signal", rank]
        assert one["code"] == 143, one["err"]
        assert one["err"].startswith("kdtoolkit: stopped by SIGTERM before training began")
        assert one["err"].count("\n") == 1


# ------------------------------------------------------------------------------------- launchers
ENDLESS = """
import signal, sys
from kdtoolkit import distill

signal.signal(signal.SIGTERM, signal.SIG_DFL)
distill(None, "cifar_resnet8", "digits", method="none", epochs=9999, batch_size=512,
        validation="none", report_to="none", progress="off", num_workers=0, output_dir=sys.argv[1])
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--cpu"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher_saves_and_stops_every_rank(launcher, tmp_path):
    script, errors = tmp_path / "train.py", tmp_path / "errors"
    script.write_text(ENDLESS)
    last = tmp_path / "run" / "checkpoints" / "last"
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(script), str(tmp_path / "run")]
    ranks = 2 if launcher == "torchrun" else 1
    with errors.open("w") as stream:
        process = subprocess.Popen(command, env=environment(), stdout=stream, stderr=stream)
        try:
            wait_for(last.exists, process, errors)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: errors.read_text().count("saved to") == ranks, None, errors)
            process.wait(60)
        finally:
            process.kill()
    said = [line for line in errors.read_text().splitlines() if "kdtoolkit: stopped" in line]
    assert len(said) == ranks
    assert all("by SIGTERM; saved to" in line for line in said)
    assert process.returncode != 0


def wait_for(is_there, process: subprocess.Popen | None, errors: Path) -> None:
    deadline = time.monotonic() + 120
    while not is_there():
        assert process is None or process.poll() is None, errors.read_text()
        assert time.monotonic() < deadline, errors.read_text()
        time.sleep(0.1)
