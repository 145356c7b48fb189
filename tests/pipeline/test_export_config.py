"""The exported student gets from timm's own transform the images that it was evaluated with."""

import json
import shutil
from contextlib import chdir
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import v2

from kdtoolkit import data, distill
from kdtoolkit.models.saving import save_model

SIZES = [(40, 30), (30, 40), (64, 20), (33, 57), (24, 24), (90, 61)]  # (W, H)
NAMES = ["ant", "bee", "cat"]


def picture(seed, size, label):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), np.uint8) // 2
    coarse[..., label] += 100
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def photos(sizes, num_rows):
    images = [picture(row, sizes[row % len(sizes)], row % 3) for row in range(num_rows)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    rows = {"image": images, "label": [row % 3 for row in range(num_rows)]}
    return datasets.Dataset.from_dict(rows, features=features)


class OwnNet(nn.Module):
    """A module of the user's, without a configuration of timm's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


TO_20 = v2.Compose([v2.Resize(23, v2.InterpolationMode.BICUBIC), v2.CenterCrop(20), v2.ToImage()])
CASES = {
    "photos": ("cifar_resnet8", SIZES, {"image_size": 32}),
    "photos, odd size": ("cifar_resnet8", SIZES, {"image_size": 50}),
    "a network of timm's, with a test size": ("test_resnet", SIZES, {"image_size": 64}),
    "equal sizes": ("cifar_resnet8", [(24, 24)], {}),
    "equal sizes, not square": ("cifar_resnet8", [(32, 24)], {}),
    "equal sizes, resized": ("cifar_resnet8", [(32, 24)], {"image_size": 20}),
    "one callable": ("cifar_resnet8", SIZES, {"transforms": v2.RandomResizedCrop(28)}),
    "a pair of callables": ("cifar_resnet8", SIZES, {"transforms": (v2.RandomCrop(16), TO_20)}),
    "crop and flip": ("cifar_resnet8", SIZES, {"transforms": "crop-flip", "image_size": 24}),
    "a ViT at its size": ("test_vit", [(160, 160)], {}),
    "own module": (OwnNet, SIZES, {"image_size": 24}),
    "not square": ("cifar_resnet8", SIZES, {"image_size": (24, 40)}),
    "equal sizes, to others": ("cifar_resnet8", [(32, 24)], {"image_size": (24, 40)}),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_timms_transform_equals_the_evaluation_to_the_last_image(case, tmp_path):
    student, sizes, options = CASES[case]
    train, test = photos(sizes, 24), photos(sizes, 42)
    own = isinstance(student, type)
    loaded_data = data.load(train, test, validation="none", num_workers=0, **options)
    result = distill(
        student=student() if own else student, train_data=loaded_data, method="none", max_steps=1,
        batch_size=24, output_dir=tmp_path, progress="off", report_to="none", figures=False,
    )  # fmt: skip
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["label_names"] == NAMES
    if own:
        loaded = OwnNet().eval()
        loaded.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
        settings = config["pretrained_cfg"]
    else:
        loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
        settings = resolve_data_config({}, model=loaded)
        assert settings == resolve_data_config({}, model=loaded, use_test_size=True)
        in_memory = resolve_data_config({}, model=result.student)
        assert {k: _plain(v) for k, v in settings.items()} == in_memory
        assert list(loaded.pretrained_cfg["label_names"]) == NAMES
        assert result.student.pretrained_cfg["label_names"] == NAMES
    transform = create_transform(**settings)
    batch = next(iter(loaded_data.test.loader(64)))
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    right = 0
    for row in range(42):
        x = transform(test[row]["image"])
        pixels = (x * std + mean) * 255
        assert pixels.shape == batch["x"][row].shape
        assert (pixels - batch["x"][row]).abs().max() < 0.01  # the same 8 bits
        with torch.no_grad():
            right += int(loaded(x[None]).argmax() == test[row]["label"])
    assert 100 * right / 42 == pytest.approx(result.metrics["top1"])
    assert result.plan["data"]["eval_is_timms"]
    assert "makes the images of the evaluation" in (tmp_path / "report.md").read_text()


def test_what_timm_cannot_make_is_said(tmp_path):
    def shrink(image):
        return image.convert("L").convert("RGB").resize((20, 20))

    given = {
        "function": {"transforms": (shrink, shrink)},
        "vit": {
            "student": "vit_tiny_patch16_224", "train_data": photos([(24, 24)], 12),
            "student_args": {"img_size": 48, "embed_dim": 12, "depth": 2, "num_heads": 2},
        },
    }  # fmt: skip
    for name, options in given.items():
        folder = tmp_path / name
        common = {"student": "cifar_resnet8", "train_data": photos(SIZES, 12)} | options
        distill(
            **common, eval_data=photos([(24, 24)], 6), method="none", validation="none",
            max_steps=1, batch_size=12, num_workers=0, output_dir=folder, progress="off",
            report_to="none", figures=False,
        )  # fmt: skip
        text = (folder / "report.md").read_text()
        assert "does not make exactly its images" in text
        config = json.loads((folder / "student" / "config.json").read_text())["pretrained_cfg"]
        side = 48 if name == "vit" else 20
        assert config["input_size"] == [3, side, side]
        wanted = "24x24 to 48x48, bilinear" if name == "vit" else "shrink"
        assert wanted in text


def test_save_model_replaces_what_was_recommended_for_other_images(tmp_path):
    net = timm.create_model("resnet10t", num_classes=2)
    net.pretrained_cfg = {
        **net.pretrained_cfg, "test_input_size": (3, 288, 288), "test_crop_pct": 0.95,
        "label_names": ["old", "names"],
    }  # fmt: skip
    before = dict(net.pretrained_cfg)
    settings = {"input_size": (3, 40, 56), "crop_pct": 0.9, "crop_mode": "squash"}
    settings |= {"interpolation": "nearest", "mean": (0.1,) * 3, "std": (0.2,) * 3}
    folder = save_model(net, tmp_path / "net", data_config=settings, label_names=["a", "b"])
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for use_test_size in (False, True):
        found = resolve_data_config({}, model=loaded, use_test_size=use_test_size)
        assert {key: _plain(found[key]) for key in settings} == settings
    assert list(loaded.pretrained_cfg["label_names"]) == ["a", "b"]
    assert net.pretrained_cfg == before


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------- the code block of the report
def code_block(folder):
    text = (folder / "report.md").read_text()
    section = text.partition("## Load the student")[2]
    return section.partition("```python\n")[2].partition("```")[0], section


class ChangedHead(nn.Module):
    def forward(self, x):
        return 2 * x


def changed():
    """A network of timm's whose weights fit and whose logits are others."""
    net = timm.create_model("cifar_resnet8", num_classes=3)
    net.fc = nn.Sequential(net.fc, ChangedHead())
    return net


def same_keys():
    net = timm.create_model("cifar_resnet8", num_classes=3)
    net.maxpool = net.act1 = nn.SiLU()
    net.forward_head = lambda x, **_: -net.fc(net.global_pool(x))
    return net


STUDENTS = {
    "a CIFAR network": ("cifar_resnet8", True),
    "a network of timm's": ("test_resnet", True),
    "a module of timm's": (lambda: timm.create_model("resnet10t", num_classes=3), True),
    "with options": (lambda: timm.create_model("cifar_resnet8", num_classes=3), True),
    "own module": (OwnNet, False),
    "another head": (changed, False),
    "the same weights, other logits": (same_keys, False),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_loading_code_of_the_report_runs(name, tmp_path):
    student, is_timms = STUDENTS[name]
    make = student if callable(student) else None
    result = distill(
        student=make() if make else student, train_data=photos([(32, 32)], 24),
        eval_data=photos([(32, 32)], 6), method="none", validation="none", max_steps=1,
        batch_size=12, num_workers=0, output_dir=tmp_path, progress="off", report_to="none",
        figures=False,
    )  # fmt: skip
    code, section = code_block(tmp_path)
    assert ("make_student()" in section) is not is_timms
    space = {} if is_timms else {"make_student": make}
    moved = Path(shutil.copytree(tmp_path, tmp_path / "moved"))
    with chdir(moved):
        exec(code, space)
    image = picture(7, (32, 32), 1)
    x = space["transform"](image)[None]
    with torch.no_grad():
        found, wanted = space["student"](x), result.student(x)
    assert torch.allclose(found, wanted, 1e-5, 1e-5) and list(space["label_names"]) == NAMES
    if name == "own module":
        assert "test_export_config.OwnNet" in section and "timm cannot build" in section
