"""Folders of runs that are continued, replaced or finished, and what must match to resume."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdtoolkit import Callback, distill, report
from kdtoolkit.data.loading import load
from kdtoolkit.pipeline import teacher_finetune
from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig, OutputConfig
from kdtoolkit.pipeline.describe import BY_CONTENT, MAY_CHANGE
from kdtoolkit.pipeline.fingerprint import of_rows
from kdtoolkit.trainer.checks import NonFiniteLoss
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.folder_lock import FolderLock, OutputDirInUse
from kdtoolkit.utils.output_dir import OutputDirNotEmpty
from kdtoolkit.utils.signals import Interrupted

OPTIONS = dict(
    method="none", max_steps=2, batch_size=32, train_limit=64, log_every=1, progress="off",
    num_workers=0, validation=32, report_to="none",
)  # fmt: skip


def call(folder, train_data="digits", student="cifar_resnet8", teacher=None, **options):
    return distill(teacher, student, train_data, output_dir=folder, **{**OPTIONS, **options})


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".kdtoolkit" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; it is copied before it is changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return call(folder, keep="all")


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return tmp_path / "run"


class Break(Callback):
    """One term is not a number from a step on; ordered behind those that count for a resume."""

    order = Callback.order

    def __init__(self, step: int = 0):
        self.step = step

    def on_losses(self, run, step, batch):
        broken = run.clock.step >= self.step
        return {"extra": step.logits["student"].sum() * (float("nan") if broken else 0.0)}


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, run, step):
        if run.clock.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


# -------------------------------------------------------------------------------- the user's files
USERS = (
    "report.md", "config.yaml", "figures/paper.png", "student/model.py", "networks/net.py",
    "baseline/notes.txt",
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"resume": "auto"}, {"resume": True}, {"overwrite": True}])
def test_no_run_touches_a_folder_of_the_users_own(options, tmp_path):
    for path in USERS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("mine")
    with pytest.raises(ValueError, match="holds"):
        call(tmp_path, **options)
    assert content(tmp_path) == dict.fromkeys(USERS, b"mine")
    assert not (tmp_path / ".kdtoolkit").exists()


def test_overwrite_keeps_files_that_no_run_wrote(run):
    users = ("notes.txt", "figures/paper.png", "student/model.py", "networks/net.py")
    (run / "networks").mkdir()
    for path in users:
        (run / path).write_text("mine")
    before = (run / "student/model.safetensors").read_bytes()
    call(run, overwrite=True, seed=1)
    assert (run / "student/model.safetensors").read_bytes() != before
    assert {path: content(run)[path] for path in users} == dict.fromkeys(users, b"mine")
    assert not (run / ".kdtoolkit/previous").exists()


def test_every_file_of_a_run_is_in_its_manifest(tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet8", num_classes=7)
    options = dict(
        method="kd", teacher=teacher, teacher_head="linear-probe", baseline=True, keep="all",
        report_to="auto", allow_weak_teacher=True,
    )  # fmt: skip
    call(tmp_path, **options)
    manifest = json.loads((tmp_path / ".kdtoolkit/manifest.json").read_text())
    inner = [p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob(".kdtoolkit")]
    assert sorted(p for p in inner if p != ".") == manifest["runs"] and len(inner) == 3
    listed = set(manifest["files"])
    for name in manifest["runs"]:
        own = json.loads((tmp_path / name / ".kdtoolkit/manifest.json").read_text())
        listed |= {f"{name}/{path}" for path in own["files"]}
    assert listed == set(content(tmp_path))
    call(tmp_path, overwrite=True)  # another run without teacher and baseline
    left = {path.partition("/")[0] for path in content(tmp_path)}
    assert left == {
        "checkpoints", "config.yaml", "env.json", "figures", "metrics.jsonl", "plan.json",
        "report.md", "student", "summary.csv",
    }  # fmt: skip


# ----------------------------------------------------------------------------------- finished runs
@pytest.mark.parametrize("resume", ["auto", True])
def test_a_finished_run_without_checkpoints_is_returned(resume, finished, run):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    again = call(run, keep="all", resume=resume, callbacks=[Break()], losses={"ce": 1.0})
    assert again.metrics == json.loads(json.dumps(finished.metrics))
    assert [r["event"] for r in again.history] == [r["event"] for r in finished.history]
    for name, value in finished.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value)
    assert not again.student.training and content(run) == before


def test_a_finished_run_with_other_settings_is_told_what_differs(run):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    with pytest.raises(CheckpointError, match="holds a finished run with other settings: optimi"):
        call(run, resume="auto", lr=0.01)
    with pytest.raises(CheckpointError, match=r"momentum: 0\.9 there, 0\.5 now"):
        call(run, resume="auto", momentum=0.5)
    (run / "student/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"student/model\.safetensors cannot be loaded"):
        call(run, resume="auto")
    del before["student/model.safetensors"]
    assert content(run) == before


# -------------------------------------------------------------------------- an old run stays whole
def test_a_failing_first_step_leaves_the_old_run_whole(run):
    (run / "notes.txt").write_text("mine")
    before = content(run)
    with pytest.raises(NonFiniteLoss, match="no checkpoint was written yet"):
        call(run, overwrite=True, callbacks=[Break()])
    assert content(run) == before
    call(run, resume="auto", keep="all")


def test_a_run_that_fails_after_its_first_checkpoint_has_replaced_the_old_one(run):
    with pytest.raises(NonFiniteLoss, match="the last good checkpoint"):
        call(run, overwrite=True, callbacks=[Break(3)], max_steps=None, epochs=2, seed=1)
    assert not (run / "student").exists() and not (run / "report.md").exists()
    assert call(run, resume="auto", max_steps=None, epochs=2, seed=1).metrics["epoch"] >= 1


def test_ctrl_c_in_the_first_epoch_saves_the_new_run_in_place_of_the_old_one(run):
    long = dict(max_steps=None, epochs=2, seed=1)
    with pytest.raises(Interrupted, match="continue with resume='auto'"):
        call(run, overwrite=True, callbacks=[StopAt(1)], **long)
    assert not (run / "student").exists()
    assert call(run, resume="auto", **long).history[-1]["step"] == 4


KILLED = """
import os, signal, sys
from kdtoolkit import Callback, distill

class Kill(Callback):
    def on_step_end(self, run, step):
        os.kill(os.getpid(), signal.SIGKILL)

distill(None, "cifar_resnet8", "digits", method="none", max_steps=2, batch_size=32, train_limit=64,
        progress="off", num_workers=0, report_to="none", output_dir=sys.argv[1], overwrite=True,
        callbacks=[Kill()])
"""


def test_a_kill_before_the_first_checkpoint_leaves_the_old_run(finished, run):
    (run / "notes.txt").write_text("mine")
    before = content(run)
    done = subprocess.run([sys.executable, "-c", KILLED, str(run)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    now = content(run)
    assert all(now[p] == before[p] for p in before if p.startswith(("student/", "figures/")))
    with pytest.raises(OutputDirNotEmpty, match="epoch 1, step 2"):
        call(run)
    assert content(run) == before
    again = call(run, resume="auto", keep="all")
    for name, value in finished.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value)


# ----------------------------------------------------------------------- what must match to resume
@pytest.mark.parametrize(
    "changed",
    [
        {"validation": 16}, {"train_limit": 60}, {"image_size": 20}, {"momentum": 0.5},
        {"warmup_epochs": 0.5}, {"mixed_precision": "bf16"}, {"eval_every": 2}, {"lr": 0.01},
        {"weight_decay": 0.0}, {"grad_clip": 1.0}, {"seed": 3}, {"batch_size": 16},
        {"max_steps": 3}, {"scheduler": "linear"}, {"optimizer": "nesterov"},
        {"transforms": "none"}, {"student_args": {"shortcut": "B"}}, {"freeze": 1},
        {"layer_decay": 0.5}, {"student": "cifar_resnet14"}, {"losses": {"ce": 2.0}},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_a_setting_that_changes_numbers_is_refused(changed, finished):
    before = content(finished.output_dir)
    with pytest.raises(CheckpointError, match="of another run: .* there, .* now"):
        call(finished.output_dir, resume="auto", **changed)
    assert content(finished.output_dir) == before


@pytest.mark.parametrize("changed", [{"milestones": (0.3,)}, {"gamma": 0.5}])
def test_milestones_count_where_the_schedule_has_them(changed, finished, tmp_path):
    call(tmp_path / "run", scheduler="multistep")
    with pytest.raises(CheckpointError, match=f"training: {next(iter(changed))}: .* there"):
        call(tmp_path / "run", scheduler="multistep", resume=True, **changed)
    if "gamma" in changed:
        call(finished.output_dir, resume=True, keep="all", **changed)


def test_what_may_change_does_not_matter(run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    result = call(
        moved, resume="auto", log_every=3, num_workers=1, channels_last=False, eval_test="every",
        label="again", keep="exported", report_to="auto",
    )  # fmt: skip
    assert result.history[-1]["step"] == 2


def arrays(seed: int = 0, rows: int = 64) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (rows, 3, 16, 16), dtype=torch.uint8, generator=draw)
    return TensorDataset(x, torch.arange(rows) % 10)


class Rows(torch.utils.data.Dataset):
    """Rows with noise of a generator of their own, which no resume can repeat."""

    def __init__(self):
        self.draw = torch.Generator().manual_seed(0)

    def __len__(self):
        return 64

    def __getitem__(self, row):
        return torch.rand(3, 16, 16, generator=self.draw), row % 10


@pytest.mark.parametrize("kind", ["data set", "loader"])
def test_other_rows_are_other_data(kind, tmp_path):
    own = dict(num_classes=10, validation="none", train_limit=None)

    def data(seed):
        return arrays(seed) if kind == "data set" else DataLoader(arrays(seed), batch_size=32)

    call(tmp_path, data(0), **own)
    call(tmp_path, data(0), resume="auto", **own)
    with pytest.raises(CheckpointError, match="data: fingerprint: train: '"):
        call(tmp_path, data(1), resume="auto", **own)


def test_rows_that_differ_each_time_do_not_stand_in_the_way(tmp_path):
    own = dict(num_classes=10, validation="none", train_limit=None)
    call(tmp_path, Rows(), **own)
    call(tmp_path, Rows(), resume="auto", **own)


def test_the_fingerprint_of_every_split_is_that_of_its_rows():
    one, same = (of_rows(load("digits", train_limit=64, validation=32)) for _ in range(2))
    assert one == same and set(one) == {"train", "val", "test"}
    other = of_rows(load("digits", train_limit=60, validation=32))
    assert other["test"] == one["test"] and other["train"] != one["train"]


def test_other_weights_of_the_student_are_another_run(tmp_path):
    net = timm.create_model("cifar_resnet8", num_classes=10)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    call(tmp_path / "run", student_weights=tmp_path / "a.pth")
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    call(tmp_path / "run", student_weights=tmp_path / "b.pth", resume="auto")  # moved
    net.fc.bias.data.fill_(1)
    torch.save(net.state_dict(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="training: student_weights: "):
        call(tmp_path / "run", student_weights=tmp_path / "b.pth", resume="auto")


def test_every_field_is_compared_or_may_change():
    assert not set(BY_CONTENT) & set(MAY_CHANGE)
    assert set(BY_CONTENT) | set(MAY_CHANGE) <= set(FIELD_NAMES)
    # the others are compared one by one; a new field is among them until it is listed


# ------------------------------------------------------------------------------- one run at a time
def test_a_folder_in_use_is_refused_and_a_plan_needs_no_lock(run):
    lock = FolderLock(run)
    lock.acquire()
    try:
        for options in ({"resume": "auto"}, {"overwrite": True}, {}):
            with pytest.raises(OutputDirInUse, match=f"process {os.getpid()} on "):
                call(run, **options)
        assert call(run, dry_run=True).plan["losses"]
    finally:
        lock.release()


def test_the_folder_is_locked_while_a_run_trains(tmp_path):
    class Second(Callback):
        def on_step_end(self, run, step):
            with pytest.raises(OutputDirInUse):
                call(tmp_path, resume="auto")

    call(tmp_path, callbacks=[Second()], max_steps=1)
    assert not (tmp_path / ".kdtoolkit/holder.json").exists()


def test_a_teacher_that_another_run_is_training_is_waited_for(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet8", num_classes=7)
    options = dict(
        method="kd", teacher=teacher, teacher_head="linear-probe", allow_weak_teacher=True,
        teacher_dir=tmp_path / "teachers",
    )  # fmt: skip
    call(tmp_path / "a", **options)
    (folder,) = (tmp_path / "teachers").iterdir()
    result_file = folder / "finetuned.json"
    stored = result_file.read_bytes()
    result_file.unlink()
    lock = FolderLock(folder)
    lock.acquire()

    def finish(seconds):
        result_file.write_bytes(stored)
        lock.release()

    monkeypatch.setattr(teacher_finetune.time, "sleep", finish)
    result = call(tmp_path / "b", **options)
    assert result.metrics["teacher_finetuned_reused"] and "Waiting for it" in caplog.text


# -------------------------------------------------------------------------------- paths and values
def test_the_home_folder_is_put_in_place_of_a_tilde(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = call("~/new", baseline="~/run", resume="~/run/checkpoints/last", keep="all")
    assert result.output_dir == tmp_path / "new" and (tmp_path / "new/report.md").exists()
    assert distill(config="~/run", output_dir=None, dry_run=True).plan["losses"]
    report.compare({"a": "~/run"}, "~/compared")
    assert (tmp_path / "compared/report.md").exists() and report.write("~/run").exists()
    same = dict(student="local-dir:~/run/student", output_dir=None)
    assert call(None, **{k: v for k, v in same.items() if k != "output_dir"}).metrics["top1"]
    weights = "~/run/student/model.safetensors"
    assert call(None, student_weights=weights, max_steps=1).metrics["top1"] is not None
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("output_dir", "", "'.' is the current folder"), ("output_dir", "  ", "allowed: the path"),
        ("output_dir", 5, "output_dir is 5"), ("output_dir", True, "output_dir is True"),
        ("output_dir", b"x", "output_dir is b'x'"), ("output_dir", "a\0b", "allowed: the path"),
        ("output_dir", "~nobody-here/x", "there is no user 'nobody-here'"),
        ("resume", 5, "resume is 5; allowed: False, True, 'auto'"), ("resume", 1, "resume is 1"),
        ("resume", 0, "resume is 0"), ("resume", "", "resume is ''"), ("resume", [], "resume is"),
        ("resume", 0.5, "resume is 0.5"), ("baseline", 5, "baseline is 5"),
        ("baseline", "", "baseline is ''"), ("baseline", [], r"baseline is \[\]"),
        ("baseline", 0, "baseline is 0"),
    ],
)  # fmt: skip
def test_values_that_are_no_folders(name, value, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig.from_keywords(**{name: value})
    assert OutputConfig(resume=None).resume is False


def test_a_baseline_that_is_none_is_found_before_training(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    alone = call(None, max_steps=1)
    for baseline, words in (
        ("nope", "baseline is 'nope', which is no folder; allowed: the folder of a finished"),
        (tmp_path / "empty", r"holds no run \(metrics.jsonl is missing\)"),
        (alone, "the result of a run without a folder"),
    ):
        for options in ({}, {"dry_run": True}):
            with pytest.raises(ValueError, match=words):
                call(tmp_path / "run", baseline=baseline, **options)
    with pytest.raises(ValueError, match="baseline has no effect without output_dir"):
        call(None, baseline=finished)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- a full disk
class NoSpaceForTheStudent(Callback):
    """From the end of training on, no file may be larger than 20 KB: a limit of the kernel."""

    def __init__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_fit_end(self, run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.before[1]))


def test_a_full_disk_when_the_student_is_written(tmp_path):
    full = NoSpaceForTheStudent()
    try:
        with pytest.raises(OSError, match="could not be written to .*student") as caught:
            call(tmp_path, callbacks=[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, full.before)
    assert f"{tmp_path}/checkpoints/last is whole: continue with resume='auto'" in str(caught.value)
    assert not list(tmp_path.glob(".student*"))
    assert call(tmp_path, resume="auto").metrics["top1"] is not None
    assert (tmp_path / "student/model.safetensors").exists()


class NoSpaceForTheCheckpoint(NoSpaceForTheStudent):
    """From the first step on, no file may be larger than a number of bytes."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def on_step_end(self, run, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))


@pytest.mark.parametrize("size", [0, 20_000])
def test_a_full_disk_at_the_first_checkpoint_leaves_the_old_run(size, run):
    before, full = content(run), NoSpaceForTheCheckpoint(size)
    try:
        with pytest.raises((OSError, CheckpointError), match="could not write"):
            call(run, overwrite=True, seed=1, callbacks=[full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, full.before)
    assert content(run) == before
    assert call(run, resume="auto", keep="all").history[-1]["step"] == 2


@pytest.mark.parametrize("name", ["holder.json", "manifest.json", "config.yaml", "plan.json"])
def test_a_full_disk_at_the_first_file(name, tmp_path, monkeypatch):
    write = Path.write_text

    def full(self, *args, **options):
        if name in self.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"output_dir .* cannot be written to \(No space left"):
            call(tmp_path / "run")
    call(tmp_path / "run", max_steps=1, resume="auto")


# --------------------------------------------------------------------------------------- two ranks
RANKS = """
import os, sys
import torch
from kdtoolkit import Callback, distill
torch.set_num_threads(1)
folder, rank = sys.argv[1], os.environ["RANK"]
options = dict(method="none", max_steps=1, batch_size=32, train_limit=32, progress="off",
               num_workers=0, report_to="none", output_dir=folder, validation="none")

class Break(Callback):
    def on_losses(self, run, step, batch):
        return {"extra": step.logits["student"].sum() * float("nan")}

distill(None, "cifar_resnet8", "digits", baseline=True, **options)
for more in ({}, {"resume": "auto", "lr": 0.01}, {"overwrite": True, "callbacks": [Break()]}):
    try:
        distill(None, "cifar_resnet8", "digits", **options, **more)
    except Exception as error:
        # one write, so that lines of two processes do not mix
        print(f"rank {rank} {type(error).__name__}\\n", end="", flush=True)
"""


def test_two_ranks_share_the_folder_and_its_errors(tmp_path):
    folder = tmp_path / "run"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    (tmp_path / "train.py").write_text(RANKS)
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *runner, str(tmp_path / "train.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        said = re.findall(rf"rank {rank} ([A-Za-z]+)", done.stdout)
        assert said == ["OutputDirNotEmpty", "CheckpointError", "NonFiniteLoss"]
    manifest = json.loads((folder / ".kdtoolkit/manifest.json").read_text())
    assert manifest["finished"] and manifest["runs"] == ["baseline"]
    listed = {path for path in content(folder) if not path.startswith("baseline/")}
    assert set(manifest["files"]) == listed and "student/model.safetensors" in listed
