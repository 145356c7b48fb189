"""Damaged, malicious and lost checkpoints of whole runs; states of a user's callbacks."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import kdtoolkit.models  # noqa: F401
from kdtoolkit import Callback, DistillResult, distill
from kdtoolkit.data.loading import load
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.checkpoint_files import is_whole, read_checked_metadata, read_states
from kdtoolkit.utils.signals import Interrupted

ROOT = Path(__file__).parents[2]
RUN = {"train_limit": 64, "batch_size": 16, "num_workers": 0, "progress": "off", "epochs": 2}


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run, step):
        if run.clock.step == self.step:
            run.stop = "interrupted"


class StopAfterAnEpoch(Callback):
    def on_epoch_end(self, run, metrics):
        run.stop = "interrupted"


@pytest.fixture(scope="module")
def digits():
    return load("digits", train_limit=64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> DistillResult:
    return run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished run, whose result is taken away."""
    copy = tmp_path / "run"
    shutil.copytree(finished.output_dir, copy)
    return copy


def run(folder: Path | None, **options) -> DistillResult:
    return distill(
        None, "cifar_resnet8", "digits", method="none", output_dir=folder, **{**RUN, **options}
    )


def weights(result: DistillResult) -> dict[str, Tensor]:
    return result.student.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "student/model.safetensors")


# ------------------------------------------------------------------------------ where to resume
KILL_IN_A_WRITE = """
import os, signal, sys
from kdtoolkit import distill
from kdtoolkit.utils import io

io.swap_folders = lambda *folders: os.kill(os.getpid(), signal.SIGKILL)
distill(
    None, "cifar_resnet8", "digits", method="none", output_dir=sys.argv[1], train_limit=64,
    batch_size=16, num_workers=0, progress="off", epochs=2)
"""


def test_a_kill_in_the_first_write_starts_again(finished, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILL_IN_A_WRITE, str(folder)]
    assert subprocess.run(command, cwd=ROOT, timeout=200).returncode == -signal.SIGKILL
    assert os.listdir(folder / "checkpoints") == [".last.tmp"]
    again = run(folder, resume="auto")
    assert same(weights(again), weights(finished)) and same(saved(folder), weights(finished))


def epoch_of(checkpoint: Path) -> int:
    return read_checked_metadata(checkpoint)["epoch"]


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_lost_last_checkpoint_goes_on_from_the_best(damage, finished, folder, caplog):
    last, best = folder / "checkpoints/last", folder / "checkpoints/best"
    if damage == "missing":
        shutil.rmtree(last)
    else:
        (last / "optimizer.safetensors").write_bytes(b"")
    again = run(folder, resume="auto")
    assert f"the run continues from {best}" in caplog.text
    assert is_whole(last) and epoch_of(last) == 2
    assert same(weights(again), weights(finished)) and again.metrics == pytest.approx(
        again.metrics, nan_ok=True
    )


def test_nothing_whole_is_an_error_that_names_the_file(folder):
    for name in ("last", "best"):
        (folder / "checkpoints" / name / "model.safetensors").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"last.model\.safetensors is damaged.*overwrite=True"
    ):
        run(folder, resume="auto")
    assert same(weights(run(folder, overwrite=True)), saved(folder))  # what it advises works


def test_an_offered_checkpoint_can_be_resumed_from(folder):
    last, best = folder / "checkpoints/last", folder / "checkpoints/best"
    (last / "loop.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        run(folder, resume=str(last))
    assert f"continue from it with resume={str(best)!r}" in str(error.value)
    rows = (folder / "metrics.jsonl").read_text()
    assert rows.count('"final"') == 1  # nothing was changed
    run(folder, resume=str(best))
    assert is_whole(last)


# ------------------------------------------------------------------------------- the best epoch
class DamageBest(Callback):
    """Does something to checkpoints/best after the last epoch."""

    order = 1000

    def __init__(self, damage) -> None:
        self.damage = damage

    def on_fit_end(self, run):
        self.damage(run.output_dir / "checkpoints/best")


class FirstIsBest(Callback):
    """The first epoch counts as the best one."""

    def on_epoch_end(self, run, metrics):
        if run.clock.epoch == 1:
            run.best["top1"] = 101.0


BEST = {
    "missing": shutil.rmtree,
    "empty file": lambda best: (best / "model.safetensors").write_bytes(b""),
    "flipped bit": lambda best: flip(best / "model.safetensors"),
    "no callbacks": lambda best: (best / "loop.safetensors").unlink(),
    "no metadata": lambda best: (best / "checkpoint.json").unlink(),
    "pickle": lambda best: (best / "model.safetensors").write_bytes(
        pickle.dumps(Marker(best.parents[1] / "marker"))
    ),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", BEST)
def test_a_lost_best_checkpoint_at_the_end_of_a_run(damage, tmp_path, caplog):
    folder = tmp_path / "run"
    result = run(folder, callbacks=[FirstIsBest(), DamageBest(BEST[damage])])
    assert (result.metrics["epoch"], result.metrics["chosen"]) == (2, "last")
    assert "The student has the weights of the last epoch (2), not those of the best epoch (1" in (
        caplog.text
    )
    last = read_states(folder / "checkpoints/last", ["model"])["model"]
    names = {key.rpartition("student.")[2]: key for key in last if "student." in key}
    found = saved(folder)
    assert same(found, weights(result)) and (folder / "report.md").exists()
    assert any(torch.equal(found["conv1.weight"], last[key]) for key in names.values())
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("damage", ["missing", "flipped bit"])
def test_a_lost_best_checkpoint_of_the_last_epoch_is_no_loss(damage, finished, tmp_path, caplog):
    class LastIsBest(Callback):
        def on_epoch_end(self, run, metrics):
            run.best = {**run.best, "epoch": run.clock.epoch, "step": run.clock.step}

    callbacks = [LastIsBest(), DamageBest(BEST[damage])]
    result = run(tmp_path / "run", callbacks=callbacks)
    assert (result.metrics["epoch"], result.metrics["chosen"]) == (2, "best")
    assert "it was the last one" in caplog.text


@pytest.mark.parametrize("damage", BEST)
def test_a_lost_best_checkpoint_of_a_run_that_is_resumed(damage, tmp_path, caplog):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, callbacks=[FirstIsBest(), StopAt(6)])  # in the second epoch
    BEST[damage](folder / "checkpoints/best")
    result = run(folder, resume="auto")
    assert "the checkpoint of the best epoch so far (epoch 1, step 4) is neither" in caplog.text
    assert result.metrics["epoch"] == 2 and is_whole(folder / "checkpoints/best")
    assert same(saved(folder), weights(result))
    assert not (folder / "marker").exists()


def test_a_lost_best_checkpoint_beside_the_last_of_the_same_step_is_made_again(tmp_path, caplog):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, callbacks=[StopAfterAnEpoch()])
    shutil.rmtree(folder / "checkpoints/best")
    run(folder, resume="auto")
    assert is_whole(folder / "checkpoints/best") and not caplog.text


# --------------------------------------------------------------------------- a stranger's folders
NAMES = (
    "custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt",
    "pytorch_model.bin", "model.pth", "model.safetensors", "loop.safetensors", "checkpoint.json",
    "config.yaml", "metrics.jsonl", "plan.json", "env.json", "config.json",
)  # fmt: skip
PLACES = ("checkpoints/last", "checkpoints/best", "checkpoints/.last.old", "checkpoints", "student")


def put_harmful_files(folder: Path, names, marker: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate(names):
        if number % 2:
            torch.save({"model": Marker(marker), "callbacks": Marker(marker)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Marker(marker)))


def run_that_may_refuse(folder: Path) -> None:
    said = str(folder)
    try:
        run(folder, resume="auto")
    except (CheckpointError, ValueError) as error:
        said = str(error)
    assert str(folder) in said


@pytest.mark.parametrize("place", [*PLACES, "."])
def test_no_file_of_a_run_folder_is_executed(place, folder, tmp_path):
    """`resume="auto"` in a folder of somebody else."""
    marker = tmp_path / "marker"
    harmless = {"model.safetensors", "loop.safetensors", "checkpoint.json"}
    put_harmful_files(folder / place, [n for n in NAMES if n not in harmless], marker)
    run_that_may_refuse(folder)
    put_harmful_files(folder / place, NAMES, marker)
    run_that_may_refuse(folder)
    assert not marker.exists()


def test_no_file_of_a_found_teacher_is_executed(digits, tmp_path):
    """A fine-tuned teacher in a shared `teacher_dir`."""
    marker = tmp_path / "marker"

    def train(output_dir):
        torch.manual_seed(0)
        teacher = timm.create_model("cifar_resnet8", num_classes=3)
        return distill(
            teacher, "cifar_resnet8", digits, method="kd", output_dir=output_dir, max_steps=1,
            batch_size=16, num_workers=0, progress="off", teacher_head="finetune",
            teacher_dir=tmp_path / "teachers", allow_weak_teacher=True,
        )  # fmt: skip

    train(tmp_path / "a")
    (found,) = (tmp_path / "teachers").iterdir()
    for name in ("student/model.safetensors", "finetuned.json"):
        good = (found / name).read_bytes()
        (found / name).write_bytes(pickle.dumps(Marker(marker)))
        with pytest.raises(ValueError, match="delete the folder, it is made again"):
            train(tmp_path / "b")
        (found / name).write_bytes(good)
    for file in sorted((found / "checkpoints").rglob("*.*")):
        if file.is_file():
            file.write_bytes(pickle.dumps(Marker(marker)))
    (found / "finetuned.json").unlink()  # its training seems to be unfinished
    train(tmp_path / "c")
    assert not marker.exists()


# ------------------------------------------------------------------------- states of callbacks
class Keeps(Callback):
    """Saves a state, and remembers what it gets back."""

    name = "keeps"

    def __init__(self, state) -> None:
        self.state, self.loaded = state, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state


def test_numpy_and_paths_in_the_state_of_a_callback_come_back(tmp_path):
    state = {
        "best": np.float64(0.5), "count": np.int32(3), "curve": np.arange(3.0), "where": Path("a"),
        "tensor": torch.ones(2, dtype=torch.bfloat16), "nested": [{"x": (1, np.bool_(True))}],
        7: float("-inf"),
    }  # fmt: skip
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(folder, callbacks=[Keeps(state), StopAt(2)])
    again = Keeps({})
    assert run(folder, resume="auto", callbacks=[again]).student is not None
    assert again.loaded.keys() == state.keys()
    for key, value in state.items():
        found = again.loaded[key]
        assert type(found) is type(value)
        equal = torch.equal if isinstance(value, Tensor) else np.array_equal
        assert found == value if isinstance(value, list) else equal(found, value)


class Own:
    pass


BAD = (
    ({"own": Own()}, r"Keeps\.state_dict\(\) \(callback 'keeps'\).*\['own'\] is an object of type"),
    ({"f": lambda x: x}, r"\['f'\] is an object of type function"),
    ({"a": {"b": [torch.nn.Linear(1, 1)]}}, r"\['a'\]\['b'\]\['0'\] is an object of type Linear"),
    ({"a": np.array([None])}, r"\['a'\] is a NumPy array of dtype object"),
    ([1, 2], "returns a list: return a dict"),
    (None, "returns a NoneType: return a dict"),
)


@pytest.mark.parametrize(("state", "message"), BAD)
def test_a_state_that_cannot_be_saved_is_refused_before_training(state, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", callbacks=[Keeps(state)])
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_state_that_becomes_wrong_in_training_names_the_callback(tmp_path):
    class Later(Keeps):
        def on_epoch_end(self, run, metrics):
            if run.clock.epoch == 2:
                self.state = {"own": Own()}

    with pytest.raises(
        CheckpointError, match=r"\['keeps'\]\['own'\] is an object of type Own"
    ) as e:
        run(tmp_path / "run", callbacks=[Later({})])
    assert "checkpoints/last is whole (epoch 1, step 4)" in str(e.value)


# ----------------------------------------------------------------------------- files and full disks
def test_file_modes_of_a_run_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run(tmp_path / "run", epochs=1)
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        if path.name != "lock" and ".kdtoolkit" not in path.parts:
            wanted = 0o750 if path.is_dir() else 0o640
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


FULL_DISK = """
import resource, sys
from kdtoolkit import Callback, distill
from kdtoolkit.utils.checkpoint import CheckpointError

class Fill(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, run, metrics):
        if run.clock.epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

def run(*callbacks):
    return distill(
        None, "cifar_resnet8", "digits", method="none", output_dir=sys.argv[1], resume="auto",
        train_limit=64, batch_size=16, num_workers=0, progress="off", epochs=3,
        callbacks=callbacks)

for epoch in (1, 2):
    try:
        run(Fill(epoch))
    except CheckpointError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("then", run().metrics["top1"])
"""


def test_a_full_disk_costs_one_epoch_and_what_the_message_advises_works(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second, then = done.stdout.strip().splitlines()
    assert "File too large; there is no earlier one" in first
    assert "File too large" in second and "checkpoints/last is whole (epoch 1, step 4)" in second
    assert "Allow larger files and continue with resume='auto'" in second
    assert then.startswith("then ")


def test_killed_twice_a_run_ends_with_the_same_weights_and_rows():
    command = [sys.executable, "benchmarks/kill_and_resume.py", "--methods", "none", "--kills", "2"]
    done = subprocess.run(
        [*command, "--epochs", "4"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 2 times; weights are bit for bit the same" in done.stdout
