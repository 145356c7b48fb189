"""The recipes of networks that teach each other, as scripts on digits."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from fitted_teacher import fit_head

from kdtoolkit import distill, list_methods, models
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.methods.factory import method_needs_teacher
from kdtoolkit.reproduce import recipes as shared

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = [
    "--dataset",
    "digits",
    "--student",
    "cifar_resnet8",
    "--rows",
    "96",
    "--epochs",
    "1",
    "--batch-size",
    "32",
]


@pytest.mark.parametrize(
    "recipe, flags, others",
    [
        ("dml_cifar100", ["--peers", "3"], {"peer1", "peer2"}),
        ("dcl_cifar100", ["--rule", "mean", "--every", "1", "--unit", "epochs"], {"peer1"}),
        ("dkel_cifar100", [], {"student", "branch1", "branch2", "ema-branch1", "ema-branch2"}),
        (
            "dkel_cifar100",
            ["--method", "pcl"],
            {"student", "branch1", "branch2", "ema-branch1", "ema-branch2"},
        ),
        ("sokd_cifar100", ["--teacher-mode", "train"], {"branch"}),
    ],
)
def test_recipe_trains_and_saves_all(recipe, flags, others, tmp_path, monkeypatch, capsys):
    if recipe == "sokd_cifar100":
        torch.manual_seed(0)
        teacher = fit_head(timm.create_model("cifar_resnet14", num_classes=10))
        models.save_model(teacher, tmp_path / "teacher", input_size=(3, 32, 32))
        flags = [*flags, "--teacher", str(tmp_path / "teacher")]
    monkeypatch.setattr(sys, "argv", [recipe, *SHORT, "--output", str(tmp_path / "run"), *flags])
    runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    assert "exported_reason" in capsys.readouterr().out
    assert (tmp_path / "run" / "student" / "model.safetensors").exists() and (
        tmp_path / "run" / "report.md"
    ).exists()
    assert {p.name for p in (tmp_path / "run" / "networks").iterdir()} == others


ONLINE = ["dcl_cifar100", "dml_cifar100", "dkel_cifar100"]
STRATEGIES = [
    name
    for name in list_methods()
    if name == "none"
    or (isinstance(METHODS[name], StrategySpec) and not method_needs_teacher(name))
]


def start(recipe, flags, monkeypatch, root):
    monkeypatch.setattr(sys, "argv", [recipe, *flags, "--output", str(root)])
    runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")


@pytest.fixture
def calls(monkeypatch):
    """What recipes pass to distill(), which makes plans."""
    found = []

    def plan(*args, **keywords):
        result = distill(*args, **keywords, dry_run=True)
        found.append(keywords | {"plan": result.plan})
        return result

    monkeypatch.setattr(shared, "distill", plan)
    return found


@pytest.mark.parametrize("recipe", ONLINE)
def test_every_strategy_works_in_every_online_recipe(recipe, calls, monkeypatch, tmp_path):
    assert {"none", "dml", "dcl", "one", "bake", "byot", "mean_teacher"} <= set(STRATEGIES)
    for method in STRATEGIES:
        start(recipe, ["--method", method, "--student", "cifar_resnet8"], monkeypatch, tmp_path)
    assert [call["method"] for call in calls] == STRATEGIES
    assert len({(call["epochs"], call["batch_size"], call["lr"]) for call in calls}) == 1
    assert all(call["plan"]["losses"] for call in calls)


def test_protocols_of_dcl_and_numbers_that_are_given(calls, monkeypatch, tmp_path):
    def numbers(*flags):
        start("dcl_cifar100", flags, monkeypatch, tmp_path)
        names = ("epochs", "batch_size", "optimizer", "lr", "gamma", "weight_decay", "momentum")
        return tuple(calls[-1][name] for name in names), list(calls[-1]["milestones"])

    paper = (200, 128, "nesterov", 0.1, 0.1, 1e-4, 0.9), [0.3, 0.6, 0.9]  # section 2.3
    released = (200, 128, "sgd", 0.001, 0.2, 5e-4, 0.9), [0.3, 0.6, 0.8]
    assert numbers() == numbers("--protocol", "paper") == paper
    assert numbers("--protocol", "released") == released
    assert numbers("--student", "resnet18.tv_in1k")[0][3] == 0.001  # pre-trained
    assert numbers("--student", "resnet18.tv_in1k", "--lr", "0.05")[0][3] == 0.05
    given = ("--epochs", "3", "--lr", "0.2", "--gamma", "0.5", "--milestones", "0.5")
    assert numbers("--protocol", "released", *given) == (
        (3, 128, "sgd", 0.2, 0.5, 5e-4, 0.9),
        [0.5],
    )
    with pytest.raises(ValueError, match="protocol is 'codes'; allowed: 'paper', 'released'"):
        numbers("--protocol", "codes")


def test_an_option_that_a_method_does_not_have_is_left_out_with_a_line(caplog):
    caplog.set_level("INFO", logger="kdtoolkit")
    given = {"networks": 3, "every": 5, "temperature": None}
    assert shared.options_for("dcl", **given) == {"peers": 3, "every": 5}
    assert not caplog.text
    assert shared.options_for("one", **given) == {"branches": 3}
    assert "method 'one' has no option every: left out" in caplog.text
    assert shared.options_for("none", **given) == {}
    with pytest.raises(ValueError, match="unknown method 'dlc'.*'dcl'"):
        shared.options_for("dlc")


def test_numbers_of_networks_are_peers_or_branches(calls, monkeypatch, tmp_path):
    start("dml_cifar100", ["--method", "one", "--peers", "4"], monkeypatch, tmp_path)
    start("dkel_cifar100", ["--method", "dml", "--branches", "3"], monkeypatch, tmp_path)
    assert (calls[0]["branches"], calls[1]["peers"]) == (4, 3)
    assert "peers" not in calls[0] and "branches" not in calls[1] and "rate" not in calls[1]


def test_several_seeds_have_folders_of_their_own_and_a_mean(monkeypatch, tmp_path, capsys):
    flags = [*SHORT, "--method", "none"]
    start("dml_cifar100", [*flags, "--seeds", "2", "--seed", "3"], monkeypatch, tmp_path / "runs")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["seed3", "seed4"]
    assert lines[-1].startswith("top-1 ") and " ± " in lines[-1]
    assert lines[-1].endswith("%, n = 2, last epoch") and len(lines) >= 3
    start("dml_cifar100", flags, monkeypatch, tmp_path / "one")
    assert (tmp_path / "one/report.md").exists()
    assert "n = " not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.py")))
def test_every_recipe_takes_seeds(recipe):
    config = runpy.run_path(str(RECIPES / f"{recipe}.py"))["Config"]
    assert config().seeds == 1 and config().seed == 0


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_a_wrong_number_of_seeds_is_named(seeds, tmp_path):
    with pytest.raises(ValueError, match="seeds is .*; allowed: a whole number from 1"):
        shared.seed_folders(seeds, 0, tmp_path)
