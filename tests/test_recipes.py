"""The recipes of networks that teach each other, as scripts on digits."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from fitted_teacher import fit_head

from kdtoolkit import models

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
