"""Every python block of the README and of the documentation runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from kdtoolkit import models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "runs/srkd_digits/teacher/student" in block:  # what the README's first command leaves
        torch.manual_seed(0)
        net = timm.create_model("cifar_resnet20", num_classes=10)
        models.save_model(
            net, tmp_path / "runs/srkd_digits/teacher/student", input_size=(3, 16, 16)
        )
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})  # noqa: S102
