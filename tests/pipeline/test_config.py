"""The typed configuration: keywords, parts, defaults, YAML and back, and `distill(config=...)`."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import timm
import yaml

from kdtoolkit import distill, schedules
from kdtoolkit.callbacks import EarlyStop
from kdtoolkit.core.callback import Callback
from kdtoolkit.data import BatchAugment
from kdtoolkit.pipeline.config import FIELD_PART, DistillConfig
from kdtoolkit.pipeline.config_file import (
    check_no_marks,
    config_to_plain,
    read_callbacks,
    read_config,
)
from kdtoolkit.pipeline.method_table import argument_texts

SHORT = {
    "figures": False,
    "max_steps": 3,
    "batch_size": 32,
    "train_limit": 96,
    "num_workers": 0,
    "progress": "off",
    "report_to": "none",
    "log_every": 1,
}


def test_keywords_of_distill_are_the_fields_with_the_same_defaults():
    parameters = dict(inspect.signature(distill).parameters)
    beyond = {"config", "callbacks", "accelerator", "dry_run", "method_options"}
    assert set(parameters) - beyond == set(FIELD_PART) - {"options"}
    defaults = DistillConfig().flat() | {"train_data": None}  # "digits" only without a call
    for name in set(parameters) - beyond:
        assert parameters[name].default == defaults[name], name


def test_keywords_and_fields_are_documented_in_the_same_words():
    told = argument_texts(inspect.getdoc(distill))
    for part in dataclasses.fields(DistillConfig):
        doc = inspect.getdoc(part.default_factory).replace("Attributes:", "Args:")
        for name, text in argument_texts(doc).items():
            if name != "options":
                assert told[name] == text, name


def test_defaults_are_resolved_once():
    papers, timms = DistillConfig(), DistillConfig.from_keywords(optimizer="adamw", max_steps=5)
    assert (papers.trainer.epochs, papers.trainer.lr, papers.trainer.weight_decay) == (
        30,
        0.05,
        5e-4,
    )
    assert (timms.trainer.epochs, timms.trainer.max_steps) == (None, 5)
    assert (timms.trainer.lr, timms.trainer.weight_decay) == (1e-3, 0.05)
    assert papers.optim.lr is None and papers.trainer is papers.trainer


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillConfig().optim.lr = 1.0


@pytest.mark.parametrize("keywords, message", [
    ({"lr": "x"}, "lr is 'x'; allowed: a finite number from 0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"lr": True}, "lr is True"),
    ({"weight_decay": -1}, "weight_decay is -1"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"epochs": 0}, "epochs is 0; allowed: a whole number from 1"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epochs": 1, "max_steps": 2}, "epochs=1 and max_steps=2: give one of them"),
    ({"batch_size": True}, "batch_size is True"),
    ({"scheduler": "cos"}, "scheduler is 'cos'; allowed: 'cosine'"),
    ({"eval_test": "never"}, "eval_test is 'never'"),
    ({"grad_clip": 0}, "grad_clip is 0"),
    ({"layer_decay": 2}, "layer_decay is 2"),
    ({"keep": "none"}, "keep is 'none'; allowed: 'exported', 'all'"),
    ({"optimizer": object}, "give its name"),
])  # fmt: skip
def test_wrong_values_are_refused_when_it_is_made(keywords, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.from_keywords(**keywords)


def test_the_old_word_for_keep_still_works():
    with pytest.warns(DeprecationWarning, match="keep='exported'"):
        assert DistillConfig.from_keywords(keep="product").output.keep == "exported"


def test_unknown_keywords_are_options_of_the_method():
    config = DistillConfig.from_keywords(method="srkd", reset=[2], lr=0.1)
    assert config.loss.options == {"reset": [2]} and config.optim.lr == 0.1
    more = config.updated(detach=False)
    assert more.loss.options == {"reset": [2], "detach": False} and config.loss.options == {
        "reset": [2]
    }


def test_to_yaml_and_back(tmp_path):
    losses = {
        "kd": schedules.Linear(1.0, 0.0),
        "ce": 1.0,
        "at": schedules.Steps((0.5,), (1.0, 2.0)),
    }
    config = DistillConfig.from_keywords(
        teacher=["a", "b"], student="c", losses=losses, layers=[(1, "layer2")], lr=0.3, p=2,
        transforms=BatchAugment(padding=2), milestones=(0.2, 0.4), labelled=0.5,
        student_args={"x": 1}, output_dir=tmp_path / "run",
    )  # fmt: skip
    plain = config_to_plain(config, {"epochs": 30}, [EarlyStop(3, min_delta=0.5)])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(plain))
    again = read_config(tmp_path / "c.yaml")
    assert again == config.updated(epochs=30, output_dir=str(tmp_path / "run"))
    (stop,) = read_callbacks(tmp_path / "c.yaml")
    assert type(stop) is EarlyStop and (stop.patience, stop.min_delta) == (3, 0.5)


class Own(Callback):
    """A callback that no file can make."""


def test_what_a_file_cannot_hold_is_asked_for(tmp_path):
    net = timm.create_model("cifar_resnet8", num_classes=10)
    plain = config_to_plain(DistillConfig.from_keywords(student=net), {}, [Own()])
    again = read_config(plain)
    with pytest.raises(
        ValueError, match=r"student was an object in that run .*ResNet.*student=\.\.\."
    ):
        check_no_marks(again)
    check_no_marks(again.updated(student=net))
    with pytest.raises(ValueError, match=r"callback of your own, .*Own.*callbacks=\[\.\.\.\]"):
        read_callbacks(plain)


@pytest.mark.parametrize("text, message", [
    ("optim:\n  lrr: 1\n", "optim: unknown 'lrr'; did you mean 'lr'"),
    ("opttim:\n  lr: 1\n", "unknown 'opttim'"),
    ("- 1\n", "holds list; a mapping of fields is needed"),
    ("a: [", "cannot be read"),
    (
        "loss:\n  losses:\n    kd: {schedule: Linearr, start: 1, end: 0}\n",
        "unknown schedule 'Linearr'",
    ),
])  # fmt: skip
def test_wrong_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "c.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no configuration file .*nothing.yaml"):
        read_config(tmp_path / "nothing.yaml")


def test_a_flat_mapping_is_read_like_keywords():
    assert read_config({"lr": 0.2, "method": "none"}) == DistillConfig.from_keywords(
        lr=0.2, method="none"
    )


@pytest.mark.parametrize("method", ["kd", "dkel"])
def test_the_file_that_a_run_leaves_starts_the_same_run(method, tmp_path):
    teacher = None
    if method == "kd":
        from kdtoolkit.models import save_model

        teacher = str(tmp_path / "teacher")
        save_model(
            timm.create_model("cifar_resnet14", num_classes=10), teacher, input_size=(3, 16, 16)
        )
    first = distill(
        teacher, "cifar_resnet8", "digits", method=method, seed=7, output_dir=tmp_path / "one",
        callbacks=[EarlyStop(5)], allow_weak_teacher=True, **SHORT,
    )  # fmt: skip
    second = distill(config=tmp_path / "one" / "config.yaml", output_dir=tmp_path / "two")
    third = distill(config=read_config(tmp_path / "one"), output_dir=tmp_path / "three", seed=8)
    losses = [
        [r["loss"] for r in run.history if r["event"] == "train"] for run in (first, second, third)
    ]
    assert losses[0] == losses[1] and losses[0] != losses[2]
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert text.replace("/one", "/two") == (tmp_path / "two" / "config.yaml").read_text()
    assert yaml.safe_load(text)["callbacks"] == [
        {"callback": "EarlyStop", "patience": 5, "min_delta": 0.0}
    ]


def test_keywords_beside_a_configuration_replace_its_values(tmp_path):
    base = DistillConfig.from_keywords(
        teacher="cifar_resnet14",
        student="cifar_resnet8",
        method="srkd",
        reset=[2],
        epochs=5,
        lr=0.3,
    )
    plan = distill(config=base, method="kd", max_steps=7, dry_run=True).plan
    assert plan["schedule"]["length"] == "7 steps" and plan["schedule"]["lr"] == 0.3
    assert {row["loss"] for row in plan["losses"]} == {"ce", "kd"}
    plan = distill(config=base, detach=False, dry_run=True).plan
    assert "srkd" in {row["loss"] for row in plan["losses"]}


def test_the_plan_shows_what_defaults_became():
    plan = distill("cifar_resnet14", "cifar_resnet8", "digits", dry_run=True).plan
    assert plan["schedule"] == {
        "length": "30 epochs", "batch_size": 128, "optimizer": "sgd", "lr": 0.05,
        "weight_decay": 5e-4, "scheduler": "cosine", "temperature": 4.0,
    }  # fmt: skip


def test_data_must_be_given():
    with pytest.raises(ValueError, match="train_data=None: pass a data set"):
        distill(None, "cifar_resnet8", method="none")
