"""One table: what goes wrong, and what the message says.

Nothing is lost: the last good checkpoint loads afterwards.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdtoolkit import Callback, create_method, distill
from kdtoolkit.data.loading import load
from kdtoolkit.data.presets import load_digits
from kdtoolkit.trainer.checks import NonFiniteLoss
from kdtoolkit.utils.checkpoint import CheckpointError

TRACKERS = ("comet_ml", "aim", "clearml", "swanlab", "wandb")
NOT_INSTALLED = next(t for t in TRACKERS if importlib.util.find_spec(t) is None)


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield
    torch.set_num_threads(threads)


class Plain(nn.Module):
    """Images (B, 3, 16, 16) to logits (B, classes), with a module that returns a tuple."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.both = Both()
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.both(self.conv(x))[0])


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu().mean((2, 3)), x


def own(classes: int = 10) -> Plain:
    torch.manual_seed(0)
    return Plain(classes)


def frozen() -> Plain:
    return own().requires_grad_(False)


def arrays(rows: int = 128) -> TensorDataset:
    batch = next(iter(load("digits").train.loader(rows)))
    return TensorDataset(batch["x"], batch["y"])


def floats(shift: float = 0.0) -> TensorDataset:
    x, y = arrays().tensors
    return TensorDataset(x.float() / 255 - shift, y)


SMALL = dict(batch_size=32, log_every=1, progress="off", num_workers=0)
SMALL |= dict(figures=False, allow_weak_teacher=True)  # teachers have random weights
DEFAULT = dict(
    teacher=None,
    student="cifar_resnet8",
    train_data="digits",
    method="none",
    max_steps=2,
    train_limit=64,
)


def call(**options):
    given = {**DEFAULT, **SMALL, **options}
    return distill(given.pop("teacher"), given.pop("student"), given.pop("train_data"), **given)


def parquet(folder: Path, data: bytes | None = None, rows: int = 40) -> Path:
    table = load_digits()["train"].select(range(rows))
    folder.mkdir(exist_ok=True)
    table.to_parquet(str(folder / "train.parquet"))
    if data is not None:
        (folder / "train.parquet").write_bytes(data)
    return folder


def truncated(tmp: Path) -> Path:
    whole = (parquet(tmp / "data") / "train.parquet").read_bytes()
    return parquet(tmp / "data", whole[: len(whole) // 2])


def corrupt_image(tmp: Path) -> datasets.Dataset:
    table = load_digits()["train"].select(range(40))
    raw = table.cast_column("image", datasets.Image(decode=False)).to_list()
    raw[7]["image"]["bytes"] = raw[7]["image"]["bytes"][:30]
    return datasets.Dataset.from_list(raw, features=table.features)


def no_labels() -> DataLoader:
    x, _ = arrays().tensors
    return DataLoader(TensorDataset(x), batch_size=32)


def wrong_labels() -> TensorDataset:
    x, y = arrays().tensors
    return TensorDataset(x, y.clone().fill_(12))


def used(tmp: Path) -> Path:
    (tmp / "run").mkdir()
    (tmp / "run/notes.txt").write_text("mine")
    return tmp / "run"


def old(tmp: Path) -> Path:
    call(output_dir=tmp / "old")
    return tmp / "old"


def lying() -> Plain:
    net = own(7)
    net.num_classes = 10
    return net


# name: (arguments, error, words of the message); an argument that is a function of the test's
# folder is called
KD = dict(teacher="cifar_resnet8", method="kd", teacher_args=None)
BOTH = own()
TEACHER = {"teacher": lambda tmp: own(), "student": lambda tmp: own(), "method": "sp"}
CASES: dict[str, tuple[dict, type[BaseException], list[str]]] = {
    "unknown student": (
        {"student": "cifar_resnet88"},
        ValueError,
        ["student", "cifar_resnet88", "cifar_resnet8"],
    ),
    "unknown teacher": (
        KD | {"teacher": "resnet510"},
        ValueError,
        ["teacher", "resnet510", "did you mean"],
    ),
    "unknown weights": (
        KD | {"teacher": "resnet18.nobody"},
        ValueError,
        ["no weights tagged 'nobody'", "a1_in1k"],
    ),
    "no published weights": (KD, ValueError, ["cifar_resnet8 has no published weights"]),
    "unknown tap": (TEACHER | {"layers": [("con", "conv")]}, ValueError, ["'con'", "'conv'"]),
    "tap of a tuple's end": (
        TEACHER | {"layers": [("both[2]", "both[0]")]},
        ValueError,
        ["'both[2]'", "'[1]'"],
    ),
    "attention at one position": (
        TEACHER | {"method": "at", "layers": [("both[0]", "both[0]")]},
        ValueError,
        ["one position"],
    ),
    "two channels": (
        KD | {"student_args": {"in_chans": 2}},
        ValueError,
        ["2 channels", "'in_chans': 3"],
    ),
    "a loss of frozen parts": (
        TEACHER | {"method": "at", "freeze": ["conv"], "layers": [("conv", "conv")]},
        RuntimeError,
        ["the loss 'at' reaches no trained parameter"],
    ),
    "layers of another kind": (TEACHER | {"layers": "all"}, ValueError, ["layers='all'", "'auto'"]),
    "no layers": (
        TEACHER | {"method": "at", "layers": None},
        ValueError,
        ["layers=None", "'auto'"],
    ),
    "layers of numbers with a point": (
        TEACHER | {"method": "at", "layers": [(1.0, 2)]},
        ValueError,
        ["[(1.0, 2)]"],
    ),
    "unknown method": ({"method": "skrd"}, ValueError, ["unknown method 'skrd'", "'srkd'"]),
    "method of another kind": ({"method": 3}, ValueError, ["method=3", "list_methods()"]),
    "unknown loss": (
        TEACHER | {"losses": {"ce": 1, "kdd": 1}},
        ValueError,
        ["unknown loss 'kdd'", "'kd'"],
    ),
    "unknown option": (TEACHER | {"resett": True}, ValueError, ["unknown option 'resett'"]),
    "misspelt argument": ({"epoch": 3}, ValueError, ["unknown argument 'epoch'", "'epochs'"]),
    "negative weight": (
        TEACHER | {"losses": {"ce": 1, "kd": -0.5}},
        ValueError,
        ["'kd' is -0.5", ">= 0"],
    ),
    "all weights zero": (TEACHER | {"losses": {"ce": 0}}, ValueError, ["every weight is zero"]),
    "no teacher": ({"method": "kd"}, ValueError, ["needs a teacher", "method='none'"]),
    "a teacher too many": (
        {"teacher": lambda tmp: own()},
        ValueError,
        ["uses no teacher", "teacher=None"],
    ),
    "other classes": (
        {"teacher": lambda tmp: own(7), "method": "kd"},
        ValueError,
        [
            "the teacher has 7 classes, the data 10",
            '"finetune"',
            '"linear-probe"',
            '"feature-only"',
            '"as-is"',
        ],
    ),
    "other classes, as is": (
        {"teacher": lambda tmp: own(7), "method": "kd", "teacher_head": "as-is"},
        ValueError,
        ["7 classes, the data 10"],
    ),
    "same module": (
        KD | {"teacher": lambda tmp: BOTH, "student": lambda tmp: BOTH},
        ValueError,
        ["share parameters", "copy.deepcopy"],
    ),
    "student in double": (
        {
            "student": lambda tmp: own().double(),
            "output_dir": lambda tmp: old(tmp),
            "overwrite": True,
        },
        ValueError,
        ["torch.float64", "student.float()", 'mixed_precision="bf16"'],
    ),
    "student in bfloat16": (
        {"student": lambda tmp: own().bfloat16()},
        ValueError,
        ["bfloat16", "student.float()"],
    ),
    "student that lies": (
        {"student": lambda tmp: lying()},
        ValueError,
        ["the student has 7 classes, the data 10"],
    ),
    "negative lr": ({"lr": -1}, ValueError, ["lr is -1", "from 0"]),
    "lr is text": ({"lr": "0.1"}, ValueError, ["lr is '0.1'; allowed: a finite number"]),
    "lr is no number": ({"lr": float("nan")}, ValueError, ["lr is nan", "finite"]),
    "negative decay": ({"weight_decay": -1e-4}, ValueError, ["weight_decay is -0.0001"]),
    "momentum": ({"momentum": 1.5}, ValueError, ["momentum is 1.5", "below 1"]),
    "negative warmup": ({"warmup_epochs": -1}, ValueError, ["warmup_epochs is -1"]),
    "features only with kd": (
        {"teacher": lambda tmp: own(7), "method": "kd", "teacher_head": "feature-only"},
        ValueError,
        ["read the teacher's logits", "leave kd out"],
    ),
    "new head of an unknown net": (
        {
            "teacher": lambda tmp: nn.Sequential(own(7), nn.ReLU()),
            "method": "kd",
            "teacher_head": "finetune",
        },
        ValueError,
        ["Sequential has no reset_classifier", "no nn.Linear makes its logits", "'feature-only'"],
    ),
    "unknown teacher_head": (
        TEACHER | {"teacher_head": "fine"},
        ValueError,
        ["'fine'", "'finetune'"],
    ),
    "student of other classes": (
        {"student": lambda tmp: own(7)},
        ValueError,
        ["student has 7 classes, the data 10"],
    ),
    "student=None": ({"student": None}, ValueError, ["student=None"]),
    "frozen student": (
        {"student": lambda tmp: frozen()},
        ValueError,
        ["every parameter of the student is frozen"],
    ),
    "loader without labels": (
        {"train_data": lambda tmp: no_labels(), "num_classes": 10, "train_limit": None},
        ValueError,
        ["label"],
    ),
    "labels out of range": (
        {"train_data": lambda tmp: wrong_labels(), "num_classes": 10},
        ValueError,
        ["row 0: label 12 is outside 0 .. 9", "num_classes"],
    ),
    "empty file": (
        {"train_data": lambda tmp: parquet(tmp / "d", b"")},
        ValueError,
        ["train.parquet", "parquet file"],
    ),
    "truncated file": (
        {"train_data": truncated},
        ValueError,
        ["train.parquet is not a whole parquet file"],
    ),
    "corrupt image": ({"train_data": corrupt_image}, ValueError, ["row 7"]),
    "normalised images": (
        {"train_data": lambda tmp: floats(0.5), "num_classes": 10},
        ValueError,
        ["[0, 1]", "normalis"],
    ),
    "used folder": (
        {"output_dir": used},
        ValueError,
        ["other files", "resume='auto'", "overwrite=True"],
    ),
    "folder is a file": (
        {"output_dir": lambda tmp: used(tmp) / "notes.txt"},
        ValueError,
        ["is a file"],
    ),
    "resume without folder": ({"resume": "auto"}, ValueError, ["resume='auto' needs output_dir"]),
    "resume of nothing": (
        {"resume": True, "output_dir": lambda tmp: tmp / "x"},
        ValueError,
        ["does not exist"],
    ),
    "resume from nowhere": (
        {"resume": "/nowhere", "output_dir": lambda tmp: tmp / "x"},
        ValueError,
        ["is no folder"],
    ),
    "batch size does not divide": (
        {"grad_accum": 3},
        ValueError,
        ["batch_size 32", "does not divide by 3"],
    ),
    "batch size too large": (
        {"batch_size": 100},
        ValueError,
        ["64 training images do not fill one batch of 100"],
    ),
    "epochs and steps": ({"epochs": 2}, ValueError, ["epochs=2 and max_steps=2", "one of them"]),
    "no epochs": ({"epochs": 0, "max_steps": None}, ValueError, ["epochs is 0"]),
    "missing tracker": (
        {"report_to": NOT_INSTALLED, "output_dir": lambda tmp: tmp / "x"},
        ValueError,
        [f"tracker {NOT_INSTALLED!r} is not installed", "report_to='none'"],
    ),
    "unknown tracker": (
        {"report_to": "tensorbored"},
        ValueError,
        ["unknown tracker 'tensorbored'", "tensorboard"],
    ),
    "unknown scheduler": (
        {"scheduler": "cosin"},
        ValueError,
        ["scheduler is 'cosin'; allowed: 'cosine'", "cosine"],
    ),
    "unknown optimizer": (
        {"optimizer": "sgdd"},
        ValueError,
        ["='sgdd'", "list_optimizers", "did you mean 'sgd"],
    ),
    "unknown progress": ({"progress": "loud"}, ValueError, ["progress is 'loud'", "'lines'"]),
    "unknown precision": ({"mixed_precision": "fp17"}, ValueError, ["fp17"]),
    "unknown validation": ({"validation": "some"}, ValueError, ["validation='some'", "'auto'"]),
    "a class of callback": ({"callbacks": [Callback]}, ValueError, ["made by calling its class"]),
    "baseline of a module": (
        {"student": lambda tmp: own(), "baseline": True, "output_dir": lambda tmp: tmp / "x"},
        ValueError,
        ["by name"],
    ),
    "clip at zero": ({"grad_clip": 0.0}, ValueError, ["grad_clip is 0.0"]),
    "a Method and losses": (
        {"student": None, "method": lambda tmp: method(), "losses": {"ce": 1.0}},
        ValueError,
        ["losses has no effect"],
    ),
}


def test_as_is_is_not_recommended_to_who_passed_it():
    with pytest.raises(ValueError, match="7 classes") as caught:
        call(teacher=own(7), student=own(), method="kd", teacher_head="as-is")
    assert "as-is" not in str(caught.value) and '"finetune"' in str(caught.value)


def test_names_are_suggested_only_where_the_name_is_unknown(monkeypatch):
    def refuse(*args, **options):
        raise ValueError("Invalid beta parameter")

    monkeypatch.setattr("kdtoolkit.trainer.optim.create_optimizer_v2", refuse)
    with pytest.raises(ValueError, match="optimizer='adamw'.*Invalid beta") as caught:
        call(optimizer="adamw")
    assert "did you mean" not in str(caught.value) and "list_optimizers" not in str(caught.value)


def test_the_logits_of_a_plain_module_count_and_not_its_num_classes():
    net = own()
    net.num_classes = 7
    assert call(student=net).metrics["top1"] >= 0


def method():
    from kdtoolkit import Taps

    return create_method("none", Taps(own(), None, 16), image=(16, 16))


@pytest.mark.parametrize("name", CASES)
def test_message(name, tmp_path):
    options, kind, words = CASES[name]
    given = {
        k: v(tmp_path) if callable(v) and not isinstance(v, type) else v for k, v in options.items()
    }
    before = sorted(p for p in tmp_path.rglob("*") if "hf" not in p.parts)
    with pytest.raises(kind) as caught:
        call(**given)
    missing = [w for w in words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    after = sorted(p for p in tmp_path.rglob("*") if "hf" not in p.parts)
    assert before == after, "an error before training leaves the disk as it was"


def test_an_option_that_looks_like_an_argument_is_an_option(tmp_path):
    result = call(
        teacher=own(), student=own(), method="sp", layers=[("conv", "conv")], train_limit=64
    )
    assert "loss/sp" in next(r for r in result.history if r["event"] == "train")
    pair = dict(teacher="cifar_resnet14", student="cifar_resnet8", dry_run=True)
    assert call(method="srkd", reset="all", **pair).plan["losses"]  # "reset" is near "resume"


def test_overwrite_takes_nothing_away_before_everything_is_known_to_work(tmp_path):
    folder = tmp_path / "run"
    call(output_dir=folder)
    with pytest.raises(ValueError, match="optimizer='sgdd'"):
        call(output_dir=folder, optimizer="sgdd", overwrite=True)
    with pytest.raises(ValueError, match="do not fill one batch"):
        call(output_dir=folder, batch_size=1000, overwrite=True)
    with pytest.raises(ValueError, match="'nowhere'"):
        call(
            teacher=own(),
            student=own(),
            method="sp",
            layers=[("nowhere", "conv")],
            output_dir=folder,
            overwrite=True,
        )
    loads(folder)
    assert timm.create_model(f"local-dir:{folder}/student", pretrained=True) is not None


# ------------------------------------------------------------------------- while a run is under way
def loads(folder: Path, **options) -> None:
    """The last good checkpoint loads: the run goes on to its end."""
    result = call(output_dir=folder, resume=True, **options)
    assert all(p.isfinite().all() for p in result.student.parameters())
    assert [r["event"] for r in result.history].count("final") == 1


class Break(Callback):
    """From `step` on one term is not a number."""

    def __init__(self, step: int):
        self.step = step

    def on_losses(self, run, step, batch):
        return {
            "extra": step.logits["student"].sum()
            * (float("nan") if run.clock.step >= self.step else 0.0)
        }


LONG = dict(max_steps=None, epochs=3, train_limit=96)  # 3 steps an epoch


def test_nan_names_step_term_and_checkpoint(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        NonFiniteLoss,
        match=r"'extra' is not finite at step 4 \(epoch 1\); the last good .*epoch 1, step 3",
    ):
        call(output_dir=folder, callbacks=[Break(4)], **LONG)
    loads(folder, **LONG)


def test_nan_before_any_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match="at step 0 .*no checkpoint was written yet"):
        call(output_dir=tmp_path / "run", callbacks=[Break(0)], **LONG)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Spoil(Callback):
        def on_step_end(self, run, step):
            if run.clock.step == 6:  # the last step of the second epoch: no loss sees it
                with torch.no_grad():
                    run.method.networks()["student"].fc.bias.fill_(float("inf"))

    folder = tmp_path / "run"
    with pytest.raises(
        (NonFiniteLoss, ValueError), match="student.fc.bias is not finite after step 6"
    ):
        call(output_dir=folder, callbacks=[Spoil()], **LONG)
    loads(folder, **LONG)


def test_checkpoint_of_another_run(tmp_path):
    folder = tmp_path / "run"
    call(output_dir=folder)
    for options, word in (
        ({"student": "cifar_resnet14"}, "networks"),
        ({"lr": 0.01}, "optimizer"),
        ({"seed": 3}, "seed"),
        (
            {"teacher": own(), "student": "cifar_resnet8", "method": "kd"},
            "method: 'none' there, 'kd' now",
        ),
    ):
        with pytest.raises(CheckpointError, match="of another run") as caught:
            call(output_dir=folder, resume=True, **options)
        assert word in str(caught.value)
    loads(folder)


class Fill(Callback):
    """From `step` on nothing more can be written: a limit of the kernel, `size` bytes a file."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, run, step):
        if run.clock.step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [0, 20_000, 200_000])
def test_full_disk_keeps_the_previous_checkpoint(size, tmp_path):
    """At 0 bytes the journal fails, at 20 KB the weights, at 200 KB (of 313 KB) too."""
    folder, fill = tmp_path / "run", Fill(5, size)
    try:
        with pytest.raises((CheckpointError, OSError), match="could not write") as caught:
            call(output_dir=folder, callbacks=[fill], **LONG)
    finally:
        fill.lift()
    assert "resume='auto'" in str(caught.value)
    assert not list((folder / "checkpoints").glob(".*"))
    loads(folder, **LONG)


def test_full_tmpfs_keeps_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a tmpfs")

    class Grow(Callback):
        def on_step_end(self, run, step):
            if run.clock.step == 5:
                with (disk / "ballast").open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(10_000))
                    except OSError:
                        pass

    try:
        with pytest.raises((CheckpointError, OSError), match="No space left|os error 28"):
            call(output_dir=disk / "run", callbacks=[Grow()], validation="none", **LONG)
        (disk / "ballast").unlink()
        loads(disk / "run", validation="none", **LONG)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------- in another process
def python(code: str, **env: str) -> subprocess.Popen:
    full = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=full, **pipes)


def test_ctrl_c_saves_says_how_to_go_on_and_going_on_works(tmp_path):
    folder = tmp_path / "run"
    code = (
        "from kdtoolkit import distill\n"
        "distill(None, 'cifar_resnet8', 'digits', method='none', epochs=400, batch_size=32, "
        "train_limit=96,"
        " log_every=1,"
        f" output_dir={str(folder)!r}, progress='off', validation='none')"
    )
    process = python(code)
    try:
        deadline = time.monotonic() + 90
        while not (folder / "checkpoints/last").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert f"saved to {folder}/checkpoints/last; continue with resume='auto'" in err
    steps = [
        r["step"]
        for r in call(
            output_dir=folder,
            resume="auto",
            validation="none",
            max_steps=None,
            epochs=400,
            train_limit=96,
            callbacks=[Enough()],
        ).history
        if r["event"] == "train"
    ]
    assert steps == list(range(1, len(steps) + 1))  # each once


class Enough(Callback):
    def on_epoch_end(self, run, metrics):
        run.stop = "enough"


def test_hub_that_cannot_be_reached(tmp_path):
    code = """
from kdtoolkit import distill
hub = ("digits", "resnet18.a1_in1k"), ("digits", "hf-hub:nobody/nothing")
for data, teacher in (("digit", None), ("cifar100", None), *hub):
    try:
        method = "kd" if teacher else "none"
        distill(
            teacher, "cifar_resnet8", data, method=method, max_steps=1, progress="off",
            allow_weak_teacher=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""
    process = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    out, err = process.communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 4, err
    assert "Did you mean 'digits'?" in lines[0]
    assert "cifar100" in lines[1] and "local copy" in lines[1] and "data_path" in lines[1]
    assert all("local copy" in x and "local-dir:PATH" in x for x in lines[2:])
