"""Blocks of the README and of the documentation run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from fitted_teacher import fit_head
from PIL import Image

from kdtoolkit import cli, models
from kdtoolkit.pipeline.config_file import read_callbacks, read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEACHER = "runs/srkd_digits/teacher/student"  # what the README's first command leaves


def blocks(language):
    """Every block of a language as a parameter, named by its page and number."""
    pattern = re.compile(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT).with_suffix('')}-{number}")
        for page in PAGES
        for number, block in enumerate(pattern.findall(page.read_text(encoding="utf-8")))
    ]


def commands():
    """Every command that only prints."""
    lines = [line for param in blocks("bash") for line in param.values[0].splitlines()]
    found = [line for line in lines if re.match(r"kdtoolkit (plan|methods)\b", line)]
    return list(dict.fromkeys(found))


def save_teacher(folder):
    torch.manual_seed(0)
    net = fit_head(timm.create_model("cifar_resnet20", num_classes=10))
    models.save_model(net, folder / TEACHER, input_size=(3, 16, 16))


def save_photos(folder):
    """Two classes of images in folders, of several sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for brightness, name in ((60, "cat"), (160, "dog")):
            target = folder / "photos" / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(brightness, brightness + 90, (40 + number, 48, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number:03}.png")


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if TEACHER in block:
        save_teacher(tmp_path)
    if '"photos"' in block:
        save_photos(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_block_is_a_configuration(block):
    values = yaml.safe_load(block)
    config = read_config(values)
    assert config != read_config({})
    assert len(read_callbacks(values)) == len(values.get("callbacks", []))


@pytest.mark.parametrize("command", commands())
def test_command_prints(command, capsys):
    words = shlex.split(command, comments=True)
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out
