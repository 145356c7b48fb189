"""Settings in report.md: the main ones, and every one that differs from its default."""

import dataclasses

import pytest
import timm

from kdtoolkit import distill
from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.pipeline.config import FIELD_NAMES, DistillConfig
from kdtoolkit.report.page_sections import NOT_SHOWN, settings_section
from kdtoolkit.report.run_folder import RunFolder

OTHERS = {  # field -> a value that is not its default; the rest get one by their type
    "optimizer": "adamw", "scheduler": "linear", "validation": "test", "losses": {"ce": 1.0},
    "layers": [(1, 2)], "transforms": BatchAugment(padding=1), "milestones": (0.5,),
    "teacher_training": {"epochs": 1}, "teacher_args": {"depth": 1}, "student_args": {"depth": 1},
    "mixed_precision": "bf16", "eval_test": "end", "keep": "all", "teacher_head": "as-is",
    "student_weights": "w.pth", "teacher_weights": "t.pth", "num_workers": 3, "image_size": 20,
    "options": {"label_smoothing": 0.1}, "max_steps": 5, "epochs": 5, "num_classes": 7,
    "labelled": 0.5, "train_limit": 9, "freeze": 1, "progress": "lines", "grad_clip": 1.0,
    "layer_decay": 0.5, "lr": 0.3, "weight_decay": 0.1, "temperature": 2.0, "momentum": 0.5,
    "gamma": 0.5, "baseline": "runs/alone", "report_to": "none", "channels_last": True,
    "channels": 1, "pixel_range": (0.0, 4095.0), "background": "black", "columns": ("a", "b"),
    "method": "none", "train_data": "cifar10", "eval_data": "folder", "data_path": "folder",
    "student": "resnet18", "teacher": "resnet50", "teacher_dir": "t", "figures": False,
    "allow_weak_teacher": True, "rank_timeout": 9.0, "compile": True, "resume": "auto",
    "overwrite": True, "output_dir": "runs/x", "label": "x", "seed": 4, "batch_size": 7,
    "grad_accum": 2, "log_every": 3, "eval_every": 4, "warmup_epochs": 0.5,
}  # fmt: skip
START = ("resume", "overwrite")  # not in config.yaml: they say how a start was made


def with_value(name, value):
    """A configuration with one field changed, unchecked: fields depend on each other."""
    config = DistillConfig()
    for part in dataclasses.fields(config):
        own = getattr(config, part.name)
        if hasattr(own, name):
            copied = object.__new__(type(own))
            copied.__dict__.update(vars(own) | {name: value})
            changed = object.__new__(DistillConfig)
            changed.__dict__.update(vars(config) | {part.name: copied})
            return changed
    raise AssertionError(name)


@pytest.mark.parametrize("name", sorted(set(FIELD_NAMES) - {*START, *NOT_SHOWN}))
def test_a_setting_that_differs_from_its_default_is_shown(name):
    from kdtoolkit.pipeline.config_file import to_plain_value

    other = OTHERS.get(name, "another value")
    config = with_value(name, other)
    assert config.changed() == [name] and DistillConfig().changed() == []
    plain = {"loop": {name: to_plain_value(other)}}
    run = RunFolder(None, [], plain, {}, [], changed=config.changed())
    assert f"| `{name}` |" in settings_section(run)


def test_a_setting_that_was_switched_off_is_shown():
    config = {"data": {"validation": None, "train_limit": None}}
    run = RunFolder(None, [], config, {}, [], changed=["validation"])
    text = settings_section(run)
    assert "| `validation` | None |" in text and "train_limit" not in text


def test_an_older_run_shows_all_that_is_set():
    config = {"optim": {"momentum": 0.5, "grad_clip": None}, "output": {"output_dir": "runs/x"}}
    text = settings_section(RunFolder(None, [], config, {}, []))
    assert "| `momentum` | 0.5 |" in text and "grad_clip" not in text and "runs/x" not in text


def test_the_settings_of_a_run(tmp_path):
    teacher = timm.create_model("cifar_resnet8", num_classes=10)
    distill(
        teacher, "cifar_resnet8", "digits", method="kd", label_smoothing=0.1, image_size=12,
        momentum=0.8, teacher_weights=teacher.state_dict(), allow_weak_teacher=True,
        max_steps=1, train_limit=64, batch_size=64, output_dir=tmp_path, progress="off",
        report_to="none", figures=False,
    )  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    for row in (
        "| `options` | label_smoothing 0.1 |", "| `image_size` | 12 |", "| `momentum` | 0.8 |",
        "| `teacher_weights` | state dict of ", "| `train_limit` | 64 |",
        "* training: Resize to 12x12", "* evaluation: Resize to 12x12",
        "* mean of the normalisation, for pixels in [0, 1]: 0.5071, 0.4867, 0.4408",
    ):  # fmt: skip
        assert row in text, row
    assert "`grad_clip`" not in text and str(tmp_path) not in text
