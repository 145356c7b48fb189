"""The loop and distill(): what a run writes, returns and repeats exactly, on real digits."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kdtoolkit import Callback, Frozen, Method, Taps, create_method, distill
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data import Data
from kdtoolkit.data import load as load_data
from kdtoolkit.losses.sp import SP
from kdtoolkit.pipeline.distill import DistillResult
from kdtoolkit.schedules import Linear
from kdtoolkit.trainer.evaluator import Evaluator
from kdtoolkit.trainer.optim import make_optimizer
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.checkpoint_files import read_states
from kdtoolkit.utils.signals import Interrupted

EVENTS = [
    "on_fit_start",
    "on_epoch_start",
    "on_losses",
    "on_grads",
    "on_step_end",
    "on_epoch_end",
    "on_fit_end",
]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A real teacher: a ResNet-14 that has seen some of the digits."""
    folder = tmp_path_factory.mktemp("teacher")
    net = timm.create_model("cifar_resnet14", num_classes=10)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.3,) * 3, "std": (0.4,) * 3}
    plain(student=net, output_dir=folder / "run", epochs=3)
    return f"local-dir:{folder / 'run' / 'student'}"


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits", train_limit=192, validation=64)


SMALL = {"batch_size": 64, "log_every": 1, "progress": "off", "lr": 0.05, "num_workers": 0}
SMALL["allow_weak_teacher"] = True  # their weights are random
SMALL["figures"] = False  # half the time of such a run


def plain(student="cifar_resnet8", train_data="digits", **options) -> DistillResult:
    return distill(None, student, train_data, method="none", **{**SMALL, **options})


def weights(result: DistillResult) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in result.student.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train_rows(result: DistillResult) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in result.history if r["event"] == "train"]


class Plain(nn.Module):
    """A user's own network without BatchNorm: images (B, 3, 16, 16) to logits (B, 10)."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))))


def own(seed: int = 0, dropout: float = 0.0) -> Plain:
    torch.manual_seed(seed)
    return Plain(dropout)


# ------------------------------------------------------------------------------------ the whole way
@pytest.fixture(scope="session")
def whole(teacher, tmp_path_factory) -> DistillResult:
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {**SMALL, "figures": True, "log_every": 50}  # more than the batches of an epoch
    return distill(
        teacher,
        "cifar_resnet8",
        "digits",
        method="srkd",
        epochs=2,
        train_limit=256,
        output_dir=folder,
        **options,
    )


def test_output_folder_is_that_of_the_contract(whole):
    folder = whole.output_dir
    for name in (
        "config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md",
        "checkpoints/last/checkpoint.json", "checkpoints/best/model.safetensors",
        "student/model.safetensors", "student/config.json",
        "figures/accuracy.png", "figures/loss.png",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    written = [p for p in folder.rglob("*") if ".kdtoolkit" not in p.parts]
    assert not [p for p in written if p.name.startswith(".") or p.suffix == ".tmp"]
    manifest = json.loads((folder / ".kdtoolkit/manifest.json").read_text())
    files = sorted(p.relative_to(folder).as_posix() for p in written if p.is_file())
    assert manifest["files"] == files and manifest["finished"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optim"]["epochs"] == 2 and config["optim"]["weight_decay"] == 5e-4
    assert config["loss"]["losses"] == {"ce": 1.0, "kd": 1.0, "srkd": 0.1}
    assert json.loads((folder / "env.json").read_text())["processes"] == 1


def test_student_folder_loads_with_timm_and_gives_equal_logits(whole):
    loaded = timm.create_model(f"local-dir:{whole.output_dir / 'student'}", pretrained=True).eval()
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), whole.student(x))


def test_returned_student_is_bare(whole):
    reference = timm.create_model("cifar_resnet8", num_classes=10)
    assert whole.student.state_dict().keys() == reference.state_dict().keys()
    assert not whole.student.training and not any(m.training for m in whole.student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.student.modules())
    assert all(p.is_contiguous() and p.requires_grad for p in whole.student.parameters())


def test_metrics_history_and_summary(whole):
    m = whole.metrics
    assert {
        "top1",
        "top5",
        "loss",
        "teacher_top1",
        "agreement",
        "retention",
        "params",
        "macs",
    } <= m.keys()
    assert (
        m["retention"] == m["top1"] / m["teacher_top1"]
        and m["split"] == "test"
        and m["chosen"] == "best"
    )
    assert m["teacher_top1"] > 30  # the teacher has learned something
    lines = [json.loads(x) for x in (whole.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == whole.history
    assert [r["event"] for r in lines[:2]] == ["teacher", "teacher"]  # evaluated first
    epochs = [r for r in lines if r["event"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [
        1,
        2,
    ]  # a row for each, though log_every is longer than an epoch
    for row in epochs:
        assert abs(row["loss"] - sum(row[f"loss/{k}"] for k in ("ce", "kd", "srkd"))) < 1e-5
    summary = (whole.output_dir / "summary.csv").read_text().splitlines()
    assert len(summary) == 3 and "train/loss/srkd" in summary[0] and "val/top1" in summary[0]


def test_best_epoch_is_the_one_that_is_returned(whole):
    best = max(
        (r for r in whole.history if r["event"] == "eval" and r["split"] == "val"),
        key=lambda r: r["top1"],
    )
    assert whole.metrics["epoch"] == best["epoch"]
    state = read_states(whole.output_dir / "checkpoints/best", ["loop"])["loop"]["loop"]
    assert state["epoch"] == best["epoch"]


def processor_time(function):
    """Seconds of processor time, the least of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return result, min(times)


def test_dry_run_is_fast_and_touches_nothing(tmp_path):
    result, took = processor_time(
        lambda: distill(
            "resnet50", "resnet18", "cifar100", method="srkd", dry_run=True,
            output_dir=tmp_path / "run",
        )
    )  # fmt: skip
    _, creation = processor_time(
        lambda: [timm.create_model(name) for name in ("resnet50", "resnet18")]
    )
    assert took < 3 * creation  # 1.0 when this was written: 0.3 s each
    assert not (tmp_path / "run").exists() and all(p.is_meta for p in result.student.parameters())
    text = str(result.plan)
    assert "layer4.1" in text and "100 classes" in text and "{" not in text


def test_plan_tells_the_data_in_one_short_line(whole):
    line = next(x for x in str(whole.plan).splitlines() if x.startswith("data: "))
    assert (
        "digits, 10 classes, 16x16 pixels, train 256, val 130, test 500" in line and "{" not in line
    )
    assert len(line) < 300


# ------------------------------------------------------------------------------------------- events
class Recorder(Callback):
    def __init__(self):
        self.seen: list[str] = []
        self.modes: set[bool] = set()

    def on_fit_start(self, run):
        self.seen.append("on_fit_start")
        self.teacher_rows = len(run.teacher_metrics)

    def on_epoch_start(self, run):
        self.seen.append("on_epoch_start")

    def on_losses(self, run, step, batch):
        self.seen.append("on_losses")
        self.modes.add(all(m.training for m in run.method.networks()["student"].modules()))
        self.x = batch["x"]
        self.student = run.method.networks()["student"]
        return

    def on_grads(self, run):
        self.seen.append("on_grads")
        self.norm = torch.stack([p.grad.norm() for p in run.method.parameters()]).norm()

    def on_step_end(self, run, step):
        self.seen.append("on_step_end")

    def on_epoch_end(self, run, metrics):
        self.seen.append("on_epoch_end")

    def on_fit_end(self, run):
        self.seen.append("on_fit_end")


def test_events_fire_in_order_and_the_student_trains_in_train_mode(teacher, digits):
    recorder = Recorder()
    student = timm.create_model(
        "cifar_resnet8", num_classes=10
    ).eval()  # as timm hands out pretrained ones
    distill(teacher, student, digits, epochs=2, callbacks=[recorder], **SMALL)
    step = ["on_losses", "on_grads", "on_step_end"]
    epoch = ["on_epoch_start", *step * 3, "on_epoch_end"]
    assert recorder.seen == ["on_fit_start", *epoch * 2, "on_fit_end"]
    assert recorder.modes == {True} and recorder.teacher_rows == 2
    assert {*recorder.seen} == {*EVENTS}


def test_on_losses_adds_a_named_loss_and_refuses_a_name_that_is_taken(digits):
    class Norm(Callback):
        def __init__(self, name):
            self.term = name

        def on_losses(self, run, step, batch):
            return {self.term: 0.5 * step.logits["student"].float().pow(2).mean()}

    result = plain(train_data=digits, max_steps=2, callbacks=[Norm("logit_norm")])
    row = next(r for r in result.history if r["event"] == "train")
    assert (
        row["loss/logit_norm"] > 0
        and abs(row["loss"] - row["loss/ce"] - row["loss/logit_norm"]) < 1e-6
    )
    with pytest.raises(ValueError, match="Norm returns the loss 'ce', which exists already"):
        plain(train_data=digits, max_steps=2, callbacks=[Norm("ce")])


# --------------------------------------------------------------------------------------- arithmetic
def test_accumulated_gradients_are_those_of_the_bigger_batch(digits):
    a = plain(own(), digits, max_steps=4, batch_size=64)
    b = plain(own(), digits, max_steps=4, batch_size=64, grad_accum=4)
    for k, v in weights(a).items():
        torch.testing.assert_close(v, weights(b)[k], rtol=1e-4, atol=1e-6)
    assert len(train_rows(a)) == 4 and len(train_rows(b)) == 16
    assert not same(weights(a), weights(plain(own(), digits, max_steps=2, batch_size=64)))


def test_accumulation_that_does_not_divide_the_epoch_leaves_no_smaller_step(digits):
    counted = (
        Recorder()
    )  # 192 images, micro-batches of 40: 4 an epoch, of which 4 make 2 steps of 80
    plain(own(), digits, epochs=2, batch_size=80, grad_accum=2, callbacks=[counted])
    assert counted.seen.count("on_losses") == 8 and counted.seen.count("on_grads") == 4


def test_clipping_bounds_the_step(digits):
    before = weights_of(own())
    clipped = plain(
        own(),
        digits,
        max_steps=1,
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        grad_clip=1e-3,
        scheduler="constant",
    )
    moved = torch.cat([(v - before[k]).flatten() for k, v in weights(clipped).items()]).norm()
    assert 0.5e-3 < moved <= 1.001e-3


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_bf16_then_fp32_in_one_process(teacher, digits):
    kinds = {}

    class Kind(Callback):
        def __init__(self, name):
            self.key = name

        def on_fit_start(self, run):
            kinds[self.key] = run.accelerator.mixed_precision
            net = run.method.networks()["student"]
            self.hook = net.conv1.register_forward_hook(
                lambda m, a, out: kinds.update({self.key + "_conv": out.dtype})
            )

        def on_fit_end(self, run):
            self.hook.remove()

    half = distill(
        teacher,
        "cifar_resnet8",
        digits,
        epochs=1,
        mixed_precision="bf16",
        callbacks=[Kind("half")],
        **SMALL,
    )
    full = distill(teacher, "cifar_resnet8", digits, epochs=1, callbacks=[Kind("full")], **SMALL)
    assert kinds == {
        "half": "bf16",
        "half_conv": torch.bfloat16,
        "full": "no",
        "full_conv": torch.float32,
    }
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
    assert abs(half.history[2]["loss"] - full.history[2]["loss"]) < 0.05 * full.history[2]["loss"]


def test_channels_last_changes_the_layout_and_not_the_student(digits):
    recorder = Recorder()
    a = plain(train_data=digits, max_steps=1, channels_last=True, callbacks=[recorder])
    assert recorder.x.is_contiguous(memory_format=torch.channels_last)
    b = plain(train_data=digits, max_steps=1, channels_last=False)
    assert abs(train_rows(a)[0][1] - train_rows(b)[0][1]) < 1e-4
    assert all(p.is_contiguous() for p in a.student.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_run_trains_like_the_plain_one(teacher, digits):
    a, b = (
        distill(
            teacher, "cifar_resnet8", digits, max_steps=2, compile=c, **SMALL, validation="none"
        )
        for c in (False, True)
    )
    for (step, x), (_, y) in zip(train_rows(a), train_rows(b), strict=True):
        assert abs(x - y) < 1e-3 * x, step
    assert a.student.state_dict().keys() == b.student.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", "falls"),
        ("linear", "falls"),
        ("multistep", "falls"),
        ("onecycle", "rises"),
        ("constant", "stays"),
    ],
)
def test_schedulers(name, expected, digits):
    result = plain(own(), digits, max_steps=6, scheduler=name)
    rates = [r["lr"] for r in result.history if r["event"] == "train"]  # after each step
    assert len(rates) == 6
    assert {
        "falls": rates[-1] < 0.2 * 0.05,
        "rises": max(rates) > rates[0],
        "stays": set(rates) == {0.05},
    }[expected]


def test_optimizers_decay_as_in_the_papers_or_as_timm():
    method = create_method("none", Taps(own(), None, 16), image=(16, 16))
    papers = make_optimizer(method, TrainerConfig(optimizer="sgd"))
    assert [g["weight_decay"] for g in papers.param_groups] == [5e-4] and not papers.param_groups[
        0
    ]["nesterov"]
    adamw = make_optimizer(method, TrainerConfig(optimizer="adamw", weight_decay=0.05))
    assert sorted(g["weight_decay"] for g in adamw.param_groups) == [0.0, 0.05]


# ------------------------------------------------------------------------------------------- repeat
def test_same_seed_same_weights_other_seed_other_weights():
    a, b, c = (plain(max_steps=3, train_limit=192, seed=s) for s in (0, 0, 1))
    assert same(weights(a), weights(b)) and train_rows(a) == train_rows(b)
    assert not same(weights(a), weights(c))


def test_weight_zero_equals_plain_training_to_the_last_digit(teacher):
    off = distill(
        teacher,
        "cifar_resnet8",
        "digits",
        losses={"ce": 1.0, "kd": 0.0},
        max_steps=4,
        train_limit=192,
        **SMALL,
    )
    none = plain(max_steps=4, train_limit=192)
    assert same(weights(off), weights(none)) and train_rows(off) == train_rows(none)


def test_first_weights_depend_on_the_seed_and_not_on_the_method(teacher, digits):
    first = {}

    class First(Callback):
        def __init__(self, name):
            self.key = name

        def on_fit_start(self, run):
            first[self.key] = weights_of(run.method.networks()["student"])

    for method in ("kd", "fitnet", "srkd"):
        distill(
            teacher,
            "cifar_resnet8",
            digits,
            method=method,
            max_steps=1,
            callbacks=[First(method)],
            **SMALL,
        )
    plain(train_data=digits, max_steps=1, callbacks=[First("none")])
    assert all(same(first["none"], first[m]) for m in ("kd", "fitnet", "srkd"))


def test_every_parameter_gets_a_gradient_or_the_error_names_it(digits):
    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)

    with pytest.raises(
        RuntimeError, match=r"no gradient reached student\.spare\.weight, student\.spare\.bias"
    ):
        plain(Spare(), digits, max_steps=1)


# ---------------------------------------------------------------------------- what may be passed in
def test_without_output_dir_the_best_weights_are_kept_in_memory(digits):
    class Spoil(Callback):
        """From the second epoch on the student is worse than chance."""

        def on_epoch_start(self, run):
            if run.clock.epoch == 0:
                self.keep = None
            else:
                with torch.no_grad():
                    run.method.networks()["student"].fc.weight.zero_()

        def on_epoch_end(self, run, metrics):
            if run.clock.epoch == 1:
                self.keep = weights_of(run.method.networks()["student"])

    spoil = Spoil()
    result = plain(own(), digits, epochs=3, lr=1e-4, callbacks=[spoil], student_args=None)
    top = [r["top1"] for r in result.history if r["event"] == "eval" and r["split"] == "val"]
    best = top.index(max(top)) + 1
    assert result.metrics["epoch"] == best and result.output_dir is None
    if best == 1:
        assert same(weights(result), spoil.keep)


def test_max_steps_ends_in_the_middle_of_an_epoch(digits, tmp_path):
    result = plain(train_data=digits, max_steps=2, output_dir=tmp_path / "run")
    assert [s for s, _ in train_rows(result)] == [1, 2]
    assert [r["epoch"] for r in result.history if r["event"] == "epoch"] == [1]
    assert "top1" in result.metrics


def arrays(rows: int = 192) -> TensorDataset:
    batch = next(iter(load_data("digits").train.loader(rows)))
    return TensorDataset(batch["x"], batch["y"])


def test_a_data_loader_keeps_its_batches():
    loader = DataLoader(arrays(), batch_size=48, shuffle=True, drop_last=True)
    recorder = Recorder()
    result = plain(
        own(), loader, eval_data=arrays(100), epochs=2, num_classes=10, callbacks=[recorder]
    )
    assert recorder.seen.count("on_losses") == 8 and recorder.x.shape == (48, 3, 16, 16)
    assert result.plan["schedule"]["batch_size"] == 48 and result.metrics["split"] == "test"


def test_agreement_with_a_shuffled_evaluation_loader(digits):
    """The teacher's predictions belong to images, not to places in the loader."""
    teacher = own()
    student = own()
    for p in student.parameters():
        p.requires_grad_(True)
    loader = DataLoader(arrays(), batch_size=48, shuffle=True)
    result = distill(
        teacher, student, arrays(), loader, max_steps=1, num_classes=10, **{**SMALL, "lr": 1e-9}
    )
    assert result.metrics["agreement"] == 100.0


class Endless(IterableDataset):
    """A stream that ends after `rows` images."""

    def __init__(self, rows: int):
        data = arrays(rows)
        self.rows = [(x, int(y)) for x, y in zip(*data.tensors, strict=True)]

    def __iter__(self):
        return iter(self.rows)


def test_a_stream_is_read_again_when_it_ends():
    result = plain(
        own(), Endless(160), eval_data=arrays(64), max_steps=5, num_classes=10, batch_size=64
    )
    assert [s for s, _ in train_rows(result)] == [1, 2, 3, 4, 5]
    assert [r["epoch"] for r in result.history if r["event"] == "epoch"] == [1, 2, 3]
    with pytest.raises(ValueError, match="the training data gave no batch"):
        plain(own(), Endless(32), eval_data=arrays(64), max_steps=5, num_classes=10, batch_size=64)


def test_own_modules_as_student_and_teacher_are_given_back_as_they_were(digits):
    teacher, student = own(1).train(), own(2)
    before = weights_of(teacher)
    result = distill(teacher, student, digits, method="kd", max_steps=2, **SMALL)
    assert result.student is student and result.metrics["teacher_top1"] >= 0
    assert same(before, teacher.state_dict()) and teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for net in (teacher, student) for m in net.modules())


def test_a_failed_call_gives_the_teacher_back(digits):
    teacher = own(1).train()
    with pytest.raises(ValueError, match="nowhere"):
        distill(
            teacher,
            own(),
            digits,
            method="sp",
            layers=[("body.nowhere", "body.0")],
            max_steps=1,
            **SMALL,
        )
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


def test_list_of_objectives(digits):
    teacher, student = own(1), own(2)
    pairs = [("body.3", "body.3")]
    part = SP(Taps(student, None, 16), Frozen(teacher, None, 16), pairs)
    result = distill(
        teacher,
        student,
        digits,
        method=[part],
        losses={"ce": 1.0, "sp": 30.0},
        max_steps=2,
        **SMALL,
    )
    rows = [r for r in result.history if r["event"] == "train"]
    assert rows[0]["loss/sp"] > 0 and rows[0]["loss/ce"] > 0
    assert not any(m._forward_hooks for m in student.modules())


def test_a_method_brings_its_own_networks(digits):
    teacher, student = own(1), own(2)

    def method() -> Method:
        return create_method(
            "kd", Taps(student, None, 16), [Frozen(teacher, None, 16)], image=(16, 16)
        )

    before = weights_of(student)
    result = distill(None, None, digits, method=method(), max_steps=2, **SMALL)
    assert result.student is student and not same(before, weights(result))
    assert "retention" in result.metrics
    with pytest.raises(ValueError, match="not the network that the Method trains"):
        distill(None, own(3), digits, method=method(), max_steps=2, **SMALL)


def test_weight_schedule_and_several_teachers(digits):
    result = distill(
        [own(1), own(2)],
        own(3),
        digits,
        losses={"ce": 1.0, "kd": Linear(1.0, 0.0)},
        max_steps=3,
        **SMALL,
    )
    rows = [r for r in result.history if r["event"] == "train"]
    assert {"loss/kd/0", "loss/kd/1"} <= rows[0].keys()
    assert {r["network"] for r in result.history if r["event"] == "teacher"} == {
        "teacher",
        "teacher/1",
    }


@pytest.mark.parametrize("head", ["finetune", "linear-probe"])
def test_a_teacher_of_other_classes_gets_a_new_head_that_is_trained_first(head, digits, tmp_path):
    teacher = timm.create_model("cifar_resnet8", num_classes=7)
    before, flags = weights_of(teacher), [p.requires_grad for p in teacher.parameters()]
    body = {k: v for k, v in before.items() if not k.startswith("fc")}
    result = distill(
        teacher,
        "cifar_resnet8",
        digits,
        epochs=1,
        teacher_head=head,
        output_dir=tmp_path / "run",
        **SMALL,
    )
    (folder,) = (tmp_path / "run/finetuned").iterdir()
    assert (folder / "student/model.safetensors").exists()
    assert teacher.num_classes == 7 and same(before, weights_of(teacher)), "the caller's own module"
    assert (
        flags == [p.requires_grad for p in teacher.parameters()] and "retention" in result.metrics
    )
    trained = timm.create_model(f"local-dir:{folder}/student", pretrained=True)
    after = {k: v for k, v in weights_of(trained).items() if k in body}
    assert trained.num_classes == 10 and same(body, after) == (head == "linear-probe")


def test_a_dry_run_and_a_refused_call_leave_the_teachers_head(digits):
    teacher = timm.create_model("cifar_resnet8", num_classes=7)
    before = weights_of(teacher)
    distill(teacher, "cifar_resnet8", "digits", teacher_head="finetune", dry_run=True)
    with pytest.raises(ValueError, match="nowhere"):
        distill(
            teacher, "cifar_resnet8", digits, method="sp", layers=[("nowhere", "layer1")],
            max_steps=1, teacher_head="linear-probe", **SMALL,
        )  # fmt: skip
    assert same(before, weights_of(teacher)) and teacher.num_classes == 7


def test_a_teacher_of_a_fixed_size_keeps_cost_and_report(digits, tmp_path, caplog):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10
    )
    options = {**SMALL, "max_steps": 1, "figures": True}
    result = distill(vit, "cifar_resnet8", digits, output_dir=tmp_path / "run", **options)
    assert {"params", "macs", "latency_ms", "teacher_macs"} <= result.metrics.keys()
    text = (tmp_path / "run/report.md").read_text()
    assert "figures/gradcam.png" in text and "could not" not in text + caplog.text
    back = distill(None, vit, digits, method="none", output_dir=tmp_path / "vit", **options)
    assert back.metrics["macs"] == result.metrics["teacher_macs"]
    assert "figures/gradcam.png" in (tmp_path / "vit/report.md").read_text()


def numbers_drawn() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize(
    "options", [{"dry_run": True}, {"max_steps": 1}, {"max_steps": 1, "lr": -1}]
)
def test_the_callers_random_numbers_go_on_as_if_there_had_been_no_call(options):
    def seed():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = numbers_drawn()
    seed()
    with contextlib.suppress(ValueError):
        plain(train_limit=128, **options)
    assert numbers_drawn() == expected


def fresh_accelerator(**options) -> Accelerator:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def accumulates(accelerator: Accelerator, model: nn.Module) -> list[bool]:
    seen = []
    for _ in range(4):
        with accelerator.accumulate(model):
            seen.append(accelerator.sync_gradients)
    return seen


def test_an_accelerator_that_is_there_already_goes_on_working(digits):
    accelerator = fresh_accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = accelerator.prepare(own())
    plain(own(), digits, max_steps=1)
    assert accelerator.mixed_precision == "bf16" and accelerator.gradient_accumulation_steps == 2
    assert accumulates(accelerator, model) == [False, True, False, True]
    fresh_accelerator()


def test_an_own_accelerator_is_given_back_as_it_was(digits, tmp_path):
    accelerator = fresh_accelerator(gradient_accumulation_steps=2)
    model = accelerator.prepare(own())
    plain(
        own(3),
        digits,
        max_steps=1,
        batch_size=64,
        grad_accum=4,
        accelerator=accelerator,
        output_dir=tmp_path / "run",
    )
    assert accelerator.gradient_accumulation_steps == 2 and not accelerator.split_batches
    assert accelerator._models == [model] and not accelerator._custom_objects
    assert accumulates(accelerator, model) == [False, True, False, True]
    assert not list((tmp_path / "run/checkpoints/last").glob("model_1*"))
    fresh_accelerator()


def test_the_last_epoch_is_evaluated_once(digits, monkeypatch):
    read, batches = [], Evaluator.batches

    def count(self, split):
        read.append(split.name)
        return batches(self, split)

    monkeypatch.setattr(Evaluator, "batches", count)
    result = plain(own(), digits, epochs=1)
    assert sorted(read) == ["test", "val"]
    row = next(r for r in result.history if r["event"] == "eval" and r["split"] == "test")
    assert {k: result.metrics[k] for k in ("top1", "loss", "ece")} == {
        k: row[k] for k in ("top1", "loss", "ece")
    }

    class Average(Callback):
        """Other weights than those that were evaluated, such as an average's."""

        def on_fit_end(self, run):
            with torch.no_grad():
                run.method.networks()["student"].fc.weight.mul_(1.5)

    read.clear()
    loader = load_data("digits", train_limit=192, validation="none")
    result = plain(own(), loader, epochs=1, callbacks=[Average()])
    assert read == ["test", "test"], "changed after the evaluation: measured again"


def test_a_run_without_evaluation_data_says_so_once(capsys):
    loader = DataLoader(arrays(), batch_size=64, shuffle=True)
    plain(own(), loader, max_steps=1, num_classes=10, progress="lines")
    assert capsys.readouterr().out.count("no evaluation data: ") == 1


def test_every_argument_of_distill_is_in_its_docstring():
    table = inspect.getdoc(distill).split("Raises ValueError")[0]
    missing = [
        name
        for name in inspect.signature(distill).parameters
        if not re.search(rf"\b{name}\b", table)
    ]
    assert not missing


def test_baseline_is_trained_first_and_shown(teacher, digits, tmp_path):
    folder = tmp_path / "run"
    distill(teacher, "cifar_resnet8", digits, epochs=1, baseline=True, output_dir=folder, **SMALL)
    assert (folder / "baseline/student/model.safetensors").exists() and (
        folder / "student"
    ).is_dir()
    assert "alone" in (folder / "report.md").read_text()


def test_a_failing_report_is_a_warning_and_the_student_is_there(digits, tmp_path, caplog):
    class Block(Callback):
        """Make a folder in the place of the report."""

        def on_fit_end(self, run):
            (run.output_dir / "report.md").mkdir()

    result = plain(train_data=digits, epochs=1, output_dir=tmp_path / "run", callbacks=[Block()])
    assert "report.md could not be written: IsADirectoryError" in caplog.text
    loaded = timm.create_model(f"local-dir:{tmp_path}/run/student", pretrained=True)
    assert same(loaded.state_dict(), weights(result))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
@pytest.mark.filterwarnings("default")
def test_tensorboard_gets_the_rows(digits, tmp_path):
    plain(own(), digits, max_steps=2, output_dir=tmp_path / "run", report_to="tensorboard")
    assert list((tmp_path / "run/trackers").rglob("events.out.tfevents*"))


def test_plain_lines_tell_processes_losses_and_retention(teacher, digits, capsys):
    options = {**SMALL, "progress": "lines", "log_every": 50}
    distill(teacher, "cifar_resnet8", digits, epochs=2, label="run 7", **options)
    lines = capsys.readouterr().out.splitlines()
    assert "run 7 1 process on cpu, precision fp32, 6 steps, 3 an epoch" in lines[0]
    epochs = [x for x in lines if "epoch 1/2" in x or "epoch 2/2" in x]
    assert len(epochs) == 2 and all("(ce " in x and "kd " in x and "val/top1" in x for x in epochs)
    assert "left" in epochs[0] and "took" in epochs[1] and "retention" in lines[-1]


# ------------------------------------------------------------------------------------------- resume
class StopAt(Callback):
    """Ctrl-C after `step`: a real signal to this process."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, run, step):
        if run.clock.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Count(Callback):
    """State of its own, named."""

    name = "count"

    def __init__(self):
        self.steps = 0

    def on_step_end(self, run, step):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def no_clock(rows: list[dict]) -> list[dict]:
    noise = ("images_per_s", "latency_ms", "teacher_latency_ms", "compression")
    return [{k: v for k, v in r.items() if k not in noise} for r in rows]


@pytest.mark.parametrize(("stop", "accum"), [(2, 1), (5, 1), (6, 1), (9, 1), (8, 2)])
def test_interrupted_and_resumed_equals_uninterrupted(stop, accum, teacher, tmp_path):
    """Losses, data order, augmentation, dropout, evaluations and weights; 3 epochs of 4 steps."""

    def run(folder: Path, **options) -> DistillResult:
        return distill(
            teacher, own(3, dropout=0.3), "digits", epochs=3, train_limit=256, output_dir=folder,
            grad_accum=accum, **{**SMALL, "log_every": 3, "batch_size": 64 * accum}, **options,
        )  # fmt: skip

    straight = run(tmp_path / "straight", callbacks=[Count()])
    with pytest.raises(
        Interrupted, match=rf"stopped at step {stop} of .*continue with resume='auto'"
    ):
        run(tmp_path / "broken", callbacks=[Count(), StopAt(stop)])
    count = Count()
    resumed = run(tmp_path / "broken", resume="auto", callbacks=[count, Recorder()])
    assert same(weights(straight), weights(resumed))
    assert no_clock(resumed.history) == no_clock(straight.history)
    rows = [json.loads(x) for x in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert no_clock(rows) == no_clock(straight.history)
    assert count.steps == straight.history[-1]["step"]


def test_resume_of_a_finished_run_trains_nothing_and_returns_the_result(whole, teacher):
    recorder = Recorder()
    options = {**SMALL, "log_every": 50}
    again = distill(
        teacher, "cifar_resnet8", "digits", method="srkd", epochs=2, train_limit=256,
        output_dir=whole.output_dir, resume="auto", callbacks=[recorder], **options,
    )  # fmt: skip
    assert recorder.seen == ["on_fit_start", "on_fit_end"]
    assert same(weights(again), weights(whole)) and no_clock(again.history) == no_clock(
        whole.history
    )


def test_resume_auto_in_an_empty_folder_starts_anew(digits, tmp_path):
    (tmp_path / "run").mkdir()
    assert (
        len(
            train_rows(
                plain(own(), digits, max_steps=2, output_dir=tmp_path / "run", resume="auto")
            )
        )
        == 2
    )


def test_a_run_stopped_by_a_callback_is_finished(digits, tmp_path):
    class Enough(Callback):
        def on_epoch_end(self, run, metrics):
            run.stop = "enough"

    plain(own(), digits, epochs=3, output_dir=tmp_path / "run", callbacks=[Enough()])
    recorder = Recorder()
    plain(own(), digits, epochs=3, output_dir=tmp_path / "run", resume=True, callbacks=[recorder])
    assert recorder.seen == ["on_fit_start", "on_fit_end"]


def test_resume_from_another_folder_takes_the_best_epoch_along(digits, tmp_path):
    with pytest.raises(Interrupted):
        plain(own(), digits, epochs=3, output_dir=tmp_path / "a", callbacks=[StopAt(7)])
    b = plain(
        own(), digits, epochs=3, output_dir=tmp_path / "b", resume=tmp_path / "a/checkpoints/last"
    )
    c = plain(own(), digits, epochs=3)
    assert same(weights(b), weights(c)) and (tmp_path / "b/checkpoints/best").is_dir()


def test_a_damaged_checkpoint_is_told(digits, tmp_path):
    folder = tmp_path / "run"
    plain(own(), digits, epochs=1, output_dir=folder)
    file = folder / "checkpoints/last/model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="last cannot be loaded"):
        plain(own(), digits, epochs=1, output_dir=folder, resume=True)
