"""Grey and four-channel images and networks, and images that do not fit in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import kdtoolkit.models  # noqa: F401
from kdtoolkit import distill
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.loading import load_model
from kdtoolkit.pipeline.config import DistillConfig

ONE_STEP = {"max_steps": 1, "batch_size": 8, "progress": "off", "lr": 0.01}
SMALL = "cifar_resnet8"


def images(channels, height=16, width=16):
    x = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (32, channels, height, width), np.uint8)
    )
    return TensorDataset(x, torch.arange(32) % 2)


def run(teacher, student, data, **options):
    return distill(teacher, student, data, data, validation="none", **ONE_STEP | options)


class Grey(nn.Module):
    """A network of the user's own, which says nothing of its channels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def test_a_grey_student_learns_from_a_colour_teacher(tmp_path):
    teacher = timm.create_model(SMALL, num_classes=2)
    result = run(
        teacher, SMALL, images(3), student_args={"in_chans": 1}, output_dir=tmp_path / "run",
        allow_weak_teacher=True,
    )  # fmt: skip
    assert result.student.in_chans == 1 and result.student(torch.zeros(2, 1, 16, 16)).shape == (
        2,
        2,
    )
    saved = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert saved["pretrained_cfg"]["input_size"] == [1, 16, 16]
    assert load_model(tmp_path / "run" / "student").in_chans == 1


def test_a_colour_student_learns_from_a_grey_teacher_of_grey_data():
    teacher = timm.create_model(SMALL, num_classes=2, in_chans=1)
    result = run(teacher, SMALL, images(1), allow_weak_teacher=True)
    assert result.student.in_chans == 3


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_builds_networks_by_name_for_them(channels):
    result = run(SMALL, SMALL, images(channels), channels=channels, dry_run=True)
    assert result.student.in_chans == channels
    trained = run(None, SMALL, images(channels), channels=channels, method="none")
    assert trained.student(torch.zeros(2, channels, 16, 16)).shape == (2, 2)


def test_a_grey_network_of_the_users_own():
    result = run(None, Grey(), images(1), method="none", channels=1)
    assert result.student(torch.zeros(2, 1, 16, 16)).shape == (2, 2)
    assert run(None, Grey(), images(3), method="none").metrics["top1"] >= 0


def test_grey_is_as_in_pil():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    x = torch.from_numpy(pixels / 255.0).float().permute(2, 0, 1)[None]
    grey = Preprocess(channels=1)(x)
    pil = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L")) / 255.0)
    assert grey.shape == (1, 1, 9, 8) and (grey[0, 0] - pil).abs().max() <= 0.51 / 255
    assert torch.equal(Preprocess(channels=3)(x[:, :1]), x[:, :1].expand(-1, 3, -1, -1))
    assert Preprocess.from_model(nn.Conv2d(3, 2, 1)).channels is None  # takes images as they are


REFUSED = {
    "two channels of a student": (
        {"student_args": {"in_chans": 2}, "data": images(3)},
        r"the student takes images of 2 channels.*student_args=\{'in_chans': 3\}",
    ),
    "four channels of a student": (
        {"student_args": {"in_chans": 4}, "data": images(3)},
        r"of 4 channels.*'in_chans': 3.*or pass channels=4 for data of 4 channels",
    ),
    "a colour student of four channels": (
        {"student_args": {"in_chans": 3}, "data": images(4), "channels": 4},
        r"of 3 channels, those of the data have 4.*'in_chans': 4",
    ),
    "data of four channels": ({"data": images(4)}, "background='white'.*or channels=4"),
    "data of two channels": ({"data": images(2)}, r"shape \(2, 16, 16\)"),
    "channels=2": ({"data": images(3), "channels": 2}, "channels=2; allowed: 3, 1"),
    "background": ({"data": images(3), "background": "glass"}, "background='glass': a colour"),
    "pixel_range": ({"data": images(3), "pixel_range": (1, 1)}, "pixel_range=.*rising order"),
    "too large": (
        {"data": "digits", "image_size": 50_000},
        "image_size=50000: a batch of 8 images takes .* GiB .* are free: pass a smaller image_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_training(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        distill(None, SMALL, options.pop("data"), method="none", **ONE_STEP | options)


def test_the_plan_says_how_images_are_read(tmp_path):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 4096, (32, 16, 16)))
    data = TensorDataset(values, torch.arange(32) % 2)
    plan = run(None, SMALL, data, method="none", dry_run=True).plan
    assert plan["data"]["images"] == "integers 0 .. 4095 scaled (decided from the first images)"
    icons = np.zeros((8, 8, 4), np.uint8)
    for row in range(12):
        folder = tmp_path / "icons" / f"class{row % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        icons[row % 8, :, 3] = 255
        Image.fromarray(icons).save(folder / f"{row}.png")
    options = {"method": "none", "image_size": 8, "background": (255, 0, 0), "dry_run": True}
    plan = distill(None, SMALL, tmp_path / "icons", **options).plan
    assert plan["data"]["images"] == "8 bits, alpha laid on (255, 0, 0)"


def test_the_options_come_back_from_a_file(tmp_path):
    import yaml

    from kdtoolkit.pipeline.config_file import config_to_plain, read_config

    config = DistillConfig.from_keywords(
        student=SMALL, method="none", background=(1, 2, 3), channels=4, pixel_range=(0, 4095)
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_plain(config, {}, ())))
    found = read_config(tmp_path / "config.yaml").data
    assert (found.background, found.channels, found.pixel_range) == ((1, 2, 3), 4, (0, 4095))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--background", "black", "--pixel-range", "0", "4095"], ("black", 3, (0, 4095))),
        (["--background", "1", "2", "3", "--channels", "1"], ((1, 2, 3), 1, None)),
        ([], (None, 3, None)),
    ],
)
def test_the_command_line_has_them(words, expected):
    from kdtoolkit.cli import parse_config

    data = parse_config(["--student", SMALL, "--method", "none", *words], "plan")[0].data
    assert (data.background, data.channels, data.pixel_range) == expected
