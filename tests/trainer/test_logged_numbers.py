"""The logged learning rate is the one that was used; top-5 is measured where it says something."""

import json

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from kdtoolkit import Callback, distill


def run(num_classes=3, callbacks=(), **options):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8)
    data = TensorDataset(x, torch.arange(48) % num_classes)
    given = {
        "method": "none", "validation": "none", "max_steps": 6, "batch_size": 12, "log_every": 1,
        "progress": "off", "num_workers": 0, "report_to": "none", "figures": False,
    }  # fmt: skip
    return distill(
        student="cifar_resnet8", train_data=data, eval_data=data, callbacks=list(callbacks),
        **(given | options),
    )  # fmt: skip


class Used(Callback):
    """Records the rates with which weights are changed, and sets them at an event."""

    def __init__(self, event="", rates=()):
        self.event, self.rates, self.used = event, list(rates), []

    def _set(self, run, event):
        if event == self.event and self.rates:
            rate = self.rates.pop(0)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

    def on_fit_start(self, run):
        self._set(run, "on_fit_start")
        inner = run.optimizer.optimizer
        inner.register_step_pre_hook(
            lambda optimizer, *_: self.used.append(max(g["lr"] for g in optimizer.param_groups))
        )

    def on_epoch_start(self, run):
        self._set(run, "on_epoch_start")

    def on_losses(self, run, step, batch):
        self._set(run, "on_losses")

    def on_grads(self, run):
        self._set(run, "on_grads")

    def on_step_end(self, run, step):
        self._set(run, "on_step_end")

    def on_epoch_end(self, run, metrics):
        self._set(run, "on_epoch_end")


EVENTS = ("", "on_fit_start", "on_epoch_start", "on_losses", "on_grads", "on_step_end",
          "on_epoch_end")  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("options", [{}, {"scheduler": "constant", "grad_accum": 2}])
def test_the_logged_learning_rate_is_the_one_used(event, options):
    callback = Used(event, [0.01, 0.002, 0.03, 0.004, 0.05, 0.006, 0.07, 0.008, 0.09] * 2)
    result = run(callbacks=[callback], **options)
    logged = [row["lr"] for row in result.history if row["event"] == "train"]
    if "grad_accum" in options:
        logged = logged[1::2]  # the batch with which weights are changed
    assert logged == callback.used and len(logged) >= 3
    epochs = [(row["step"], row["lr"]) for row in result.history if row["event"] == "epoch"]
    by_step = {row["step"]: row["lr"] for row in result.history if row["event"] == "train"}
    assert epochs and all(by_step[step] == rate for step, rate in epochs)


def test_without_a_callback_the_first_rate_is_that_of_the_first_step():
    rates = [row["lr"] for row in run(lr=0.2).history if row["event"] == "train"]
    assert rates[0] == 0.2 and rates[-1] > 0 and rates == sorted(rates, reverse=True)
    layers = run(lr=0.2, layer_decay=0.5).history
    assert [row["lr"] for row in layers if row["event"] == "train"] == pytest.approx(rates)


@pytest.mark.parametrize(("num_classes", "is_measured"), [(2, False), (5, False), (6, True)])
def test_top_5_is_left_out_where_it_is_always_100(num_classes, is_measured, tmp_path):
    teacher = timm.create_model("cifar_resnet8", num_classes=num_classes)
    options = {"teacher": teacher, "method": "kd", "max_steps": 1, "output_dir": tmp_path}
    result = run(num_classes, teacher_head="as-is", allow_weak_teacher=True, **options)
    assert ("top5" in result.metrics) is ("teacher_top5" in result.metrics) is is_measured
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert any("top5" in row for row in rows) is is_measured
    assert ("top-5" in (tmp_path / "report.md").read_text()) is is_measured
