"""The order of a teacher's classes beside that of the data."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import Dataset

import kdtoolkit.models  # noqa: F401
from kdtoolkit import distill
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses.kd import KD
from kdtoolkit.methods.offline import OfflineDistillation
from kdtoolkit.pipeline.class_order import label_names, match_class_order

DATA = ["bird", "cat", "dog", "frog"]
ORDER = [2, 0, 3, 1]  # of the data's classes in the teacher's
THEIRS = [DATA[k] for k in (1, 3, 0, 2)]


def teacher(names=THEIRS, name="cifar_resnet8"):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=len(names))
    net.pretrained_cfg = {**net.pretrained_cfg, "label_names": names}
    return net.eval()


def match(net, names=DATA, **options):
    notes = []
    given = dict(label="the teacher", head=None, is_callers=True, notes=notes) | options
    return match_class_order(Taps(net, None, 32), names, **given), notes


@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "cifar_vgg8", "convnext_atto", "mobilenetv3_small_050"]
)
def test_another_order_is_put_right_in_a_copy(name):
    net = teacher(name=name)
    x = torch.rand(2, 3, 32, 32)
    before, weights = net(x), copy.deepcopy(net.state_dict())
    found, notes = match(net)
    torch.testing.assert_close(found(x), before[:, ORDER])
    assert label_names(found) == DATA and "its logits are put into the data's order" in notes[0]
    assert found is not net and label_names(net) == THEIRS
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    again, notes = match(found)
    assert again is found and not notes
    own, _ = match(net, is_callers=False)
    assert own is net and torch.equal(net(x), found(x))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (DATA, DATA),
        (["Bird", "CAT", "dog ", "Frog"], DATA),
        (["great_white-shark", "b"], ["Great white shark", "B"]),
        (None, DATA),
        (THEIRS, None),
        (["a", "b", "c"], DATA),
        (["0", "1", "2", "10"], ["0", "1", "2", "10"]),
    ],
)
def test_nothing_to_do(theirs, ours):
    net = teacher(theirs or THEIRS)
    if theirs is None:
        net.pretrained_cfg.pop("label_names")
    assert match(net, ours) == (net, [])


def test_numbers_in_the_order_of_text():
    """A teacher that was trained on "0", "1", "10", "2" teaches classes 0, 1, 2, 10."""
    net = teacher(["0", "1", "10", "2"])
    x = torch.rand(2, 3, 32, 32)
    found, _ = match(net, ["0", "1", "2", "10"])
    torch.testing.assert_close(found(x), net(x)[:, [0, 1, 3, 2]])


def test_other_names_are_told():
    net = teacher(["n01", "n02", "n03", "n04"])
    found, notes = match(net)
    assert found is net and "could not be compared" in notes[0]
    found, notes = match(teacher(["bird", "kitten", "dog", "frog"]))  # the rest in its place
    assert "could not be compared" in notes[0]


def test_some_classes_in_other_places_are_refused():
    net = teacher(["cat", "kitten", "dog", "frog"])
    with pytest.raises(ValueError, match=r"class 1 of the data is 'cat', of the teacher it is 'k"):
        match(net)
    for head in ("finetune", "linear-probe", "feature-only", "as-is"):
        assert match(net, head=head)[0] is net
    with pytest.raises(ValueError, match=r"class 0 of the data is 'bird', of the teacher it is"):
        match(teacher(), can_change=False)


class Cosine(nn.Module):
    """A classifier that is no plain matrix."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.weight = nn.Parameter(torch.rand(4, 8))
        self.pretrained_cfg = {"label_names": THEIRS}

    def forward(self, x):
        return nn.functional.normalize(self.body(x)) @ nn.functional.normalize(self.weight).T


def test_a_classifier_that_cannot_be_reordered():
    with pytest.raises(ValueError, match=r"classifier \(none was found\) cannot be put into"):
        match(Cosine())


class Rows(Dataset):
    """Named classes, as torchvision's data sets have them."""

    classes = DATA
    targets = [k % 4 for k in range(24)]  # noqa: RUF012

    def __len__(self):
        return 24

    def __getitem__(self, row):
        return torch.full((3, 32, 32), row / 24), self.targets[row]


RUN = dict(
    student="cifar_resnet8", train_data=Rows(), num_workers=0, transforms="none", max_steps=1,
    batch_size=8, progress="off", report_to="none",
)  # fmt: skip


def test_a_run_with_a_teacher_of_another_order():
    net = teacher()
    lines = str(distill(teacher=net, dry_run=True, **RUN).plan).replace("\n", " ")
    assert "4 classes (0 bird, 1 cat, 2 dog, 3 frog)" in lines
    assert "the teacher has the data's classes in another order" in lines
    right = teacher(DATA)
    with torch.no_grad():
        for key in ("weight", "bias"):
            getattr(right.fc, key).copy_(getattr(net.fc, key)[ORDER])
    allowed = dict(allow_weak_teacher=True)
    found, wanted = (distill(teacher=t, **RUN, **allowed) for t in (net, right))
    assert found.metrics["teacher_loss"] == wanted.metrics["teacher_loss"]
    assert torch.equal(found.student.fc.weight, wanted.student.fc.weight)


def test_a_method_that_is_built_is_compared():
    def plan(names):
        student = timm.create_model("cifar_resnet8", num_classes=4)
        taps, frozen = Taps(student, None, 32), Frozen(teacher(names), None, 32)
        losses = {"kd": KD(taps, frozen)}
        method = OfflineDistillation(taps, [frozen], losses, {"ce": 1.0, "kd": 1.0})
        return distill(dry_run=True, method=method, **RUN | {"student": None}).plan

    assert plan(DATA)["data"]["classes"] == DATA
    with pytest.raises(ValueError, match="class 0 of the data is 'bird', of the teacher it is 'ca"):
        plan(THEIRS)
