"""Every argument of `distill()` refuses what it cannot use, in our words, before training begins.

The values of `tests/wrong_values.py` are given to each argument in turn; a table says which of them
it takes.
"""

from __future__ import annotations

import inspect
import warnings

import pytest

from kdtoolkit import distill
from kdtoolkit.trainer.trainer import Trainer
from tests.wrong_values import (
    FLAG,
    FROM_0,
    NOTHING,
    POSITIVE,
    POSITIVE_WHOLE,
    TEXT,
    TrainingHasBegun,
    fault_of,
    wrong_values,
)

RUN = dict(
    student="cifar_resnet8", train_data="digits", method="none", max_steps=2, batch_size=32,
    train_limit=64, validation=32, num_workers=0, progress="off", report_to="none",
)  # fmt: skip
# argument -> the values that it takes; those that name a folder are not tried
ALLOWED: dict[str, tuple[str, ...]] = {
    "teacher": ("None", *TEXT, "[]", "()"),
    "student": TEXT,
    "train_data": ("None", *TEXT),
    "eval_data": ("None", *TEXT),
    "config": ("None", "{}", *TEXT),
    "teacher_head": NOTHING,
    "teacher_dir": ("None", "text", "number as text"),
    "teacher_training": ("None", "{}"),
    "allow_weak_teacher": FLAG,
    "freeze": ("None", *POSITIVE_WHOLE),
    "student_weights": ("None",),
    "teacher_weights": NOTHING,
    "student_args": ("None", "{}"),
    "teacher_args": NOTHING,
    "data_path": ("None", "text", "number as text"),
    "num_classes": ("None",),
    "validation": ("None", "0", *POSITIVE_WHOLE, "tiny"),
    "transforms": ("None", "function", "class"),
    "background": ("None", "range"),
    "channels": ("1", "3"),
    "pixel_range": ("None",),
    "columns": ("None",),
    "rank_timeout": (*POSITIVE, "huge"),
    "figures": FLAG,
    "image_size": ("None", *POSITIVE_WHOLE),
    "train_limit": ("None",),
    "labelled": ("None",),
    "num_workers": ("0", *POSITIVE_WHOLE),
    "losses": ("None",),
    "temperature": ("None",),
    "epochs": ("None", *POSITIVE_WHOLE),
    "max_steps": ("None", *POSITIVE_WHOLE),
    "batch_size": POSITIVE_WHOLE,
    "grad_accum": ("1",),
    "lr": ("None", *POSITIVE),
    "weight_decay": ("None", *FROM_0),
    "momentum": ("0", "tiny"),
    "milestones": ("[]", "()", "[1]"),
    "gamma": FROM_0,
    "warmup_epochs": ("0", "1", "tiny"),
    "grad_clip": ("None", *POSITIVE, "huge"),
    "layer_decay": ("None", "1", "tiny"),
    "seed": ("0", *POSITIVE_WHOLE),
    "mixed_precision": ("None",),
    "compile": FLAG,
    "channels_last": FLAG,
    "log_every": POSITIVE_WHOLE,
    "eval_every": POSITIVE_WHOLE,
    "report_to": ("None", "[]", "()"),
    "progress": FLAG,
    "label": TEXT,
    "output_dir": ("None", "text", "number as text"),
    "resume": ("None", "False"),
    "overwrite": FLAG,
    "baseline": ("None", "False"),
    "callbacks": ("None", "[]", "()", "set"),
    "accelerator": ("None",),
    "dry_run": FLAG,
}
ARGUMENTS = [name for name in inspect.signature(distill).parameters if name != "method_options"]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch, tmp_path):
    def fit(self, resume_from=None):
        raise TrainingHasBegun

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.chdir(tmp_path)


def test_there_are_300_wrong_values_and_more():
    assert sum(len(wrong_values(ALLOWED.get(name, ()))) for name in ARGUMENTS) > 1500


def call(name: str, value: object) -> None:
    options = {**RUN, name: value}
    if name == "epochs":
        del options["max_steps"]
    distill(**options)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_values_are_refused(name):
    found = {}
    for label, value in wrong_values(ALLOWED.get(name, ())).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[label] = fault_of(lambda value=value: call(name, value))
    faults = {label: fault for label, fault in found.items() if fault is not None}
    assert not faults
