"""Teachers that cannot teach stop the run; sources and options of networks, as users write them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from fitted_teacher import fit_head
from torch import nn

from kdtoolkit import Frozen, Taps, create_method, distill
from kdtoolkit.data import Data
from kdtoolkit.data import load as load_data
from kdtoolkit.models.loading import load_model
from kdtoolkit.models.saving import save_model

SMALL = dict(batch_size=32, progress="off", num_workers=0, max_steps=1)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", train_limit=64, validation=64)


@pytest.fixture(scope="module")
def good() -> nn.Module:
    torch.manual_seed(0)
    return fit_head(timm.create_model("cifar_resnet8", num_classes=10))


@pytest.fixture(scope="module")
def few() -> Data:
    """Without a test set."""
    data = load_data("digits", train_limit=64, validation=10)
    return Data(**{**vars(data), "test": None})


def random(name: str = "cifar_resnet8", classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes)


def silent(classes: int = 10) -> nn.Module:
    """Always the same answer."""
    net = random(classes=classes)
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.copy_(torch.arange(classes))
    return net


def permuted(net: nn.Module) -> nn.Module:
    """The same teacher with its classes in another order."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.fc.weight.copy_(net.fc.weight.roll(1, 0))
        other.fc.bias.copy_(net.fc.bias.roll(1, 0))
    return other


def call(teacher, student="cifar_resnet8", data="digits", **options):
    return distill(teacher, student, data, **{**SMALL, **options})


# -------------------------------------------------------------------------------- near chance
WEAK = {
    "constant": ({}, lambda good: silent()),
    "other order of classes": ({}, permuted),
    "second of two": ({}, lambda good: [good, silent()]),
    "features of it": ({"method": "at"}, lambda good: silent()),
    "as is": ({"teacher_head": "as-is"}, lambda good: silent()),
    "sokd": ({"method": "sokd"}, lambda good: silent()),
}


@pytest.mark.parametrize("case", WEAK)
def test_a_teacher_near_chance_stops_the_run(case, good, digits, tmp_path):
    options, make = WEAK[case]
    teacher = make(good)
    name = "teacher/1" if isinstance(teacher, list) else "teacher"
    words = f"the {name} is near chance: its top-1 is .* % on the 500 images of the test split"
    with pytest.raises(ValueError, match=words) as caught:
        call(teacher, data=digits, output_dir=tmp_path / "run", **options)
    assert "allow_weak_teacher=True" in str(caught.value)
    assert "teacher_head='finetune'" in str(caught.value)
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["event"] in ("train", "epoch")], "nothing was trained"


def test_it_may_teach_where_that_is_said(digits):
    result = call(silent(), data=digits, allow_weak_teacher=True)
    assert result.metrics["teacher_top1"] < 15


def test_a_good_teacher_teaches(good, digits):
    result = call([good, copy.deepcopy(good)], data=digits)
    assert result.metrics["teacher_top1"] > 50


def test_a_method_with_a_weak_teacher(digits):
    method = create_method("kd", Taps(random(), None, 16), [Frozen(silent(), None, 16)])
    with pytest.raises(ValueError, match="is near chance"):
        distill(None, None, digits, method=method, **SMALL)


def test_features_alone_may_be_those_of_other_classes(digits):
    call(silent(), data=digits, method="sp", teacher_head="feature-only")
    call(silent(7), data=digits, method="sp", teacher_head="feature-only")


@pytest.mark.parametrize("method", ["none", "dml", "mean_teacher", "byot"])
def test_methods_without_a_frozen_teacher_are_not_concerned(method, digits):
    call(None, data=digits, method=method)


def test_a_teacher_is_checked_after_its_fine_tuning(good, digits):
    own = {"teacher_head": "linear-probe", "lr": 1e-9}
    with pytest.raises(ValueError, match=r"near chance.*teacher_training=\{'epochs'"):
        call(silent(7), data=digits, **own)
    result = call(good, data=digits, **own)
    assert result.metrics["teacher_finetuned_top1"] > 50


def test_few_images_stop_no_right_teacher(good, few):
    call(good, data=few)


def test_the_weights_of_another_depth_do_not_teach(digits):
    weights = random("cifar_resnet20").state_dict()
    words = "128 of 188 tensors fit; 60 missing .*They fit cifar_resnet20"
    for options in ({}, {"teacher_head": "finetune"}, {"dry_run": True}):
        with pytest.raises(ValueError, match=words):
            call("cifar_resnet32", data=digits, teacher_weights=weights, **options)


# ------------------------------------------------------------------------------------- sources
def test_the_folder_of_a_run_teaches_with_its_student(good, digits, tmp_path):
    save_model(good, tmp_path / "run" / "student")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    result = call(str(tmp_path / "run"), data=digits)
    assert result.metrics["teacher_top1"] > 50
    note = f"teacher: {tmp_path / 'run'} is a run's folder, its student is loaded"
    assert note in result.plan["notes"]
    call("cifar_resnet8", data=digits, teacher_weights=tmp_path / "run")


def test_a_folder_that_a_run_made(few, tmp_path):
    student = call(None, data=few, method="none", output_dir=tmp_path / "run").student
    loaded = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in student.state_dict().items())


def test_a_file_of_weights_as_a_teacher(good, tmp_path):
    torch.save({"state_dict": good.state_dict(), "arch": "cifar_resnet8"}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="pass teacher='cifar_resnet8' and teacher_weights="):
        call(path)
    assert call("cifar_resnet8", teacher_weights=path, dry_run=True).plan["notes"]
    with pytest.raises(ValueError, match=r"teacher: there is no file m\.pth\.tar"):
        call("m.pth.tar")


WRONG_OPTIONS = {
    "classes of a student": (
        {"student_args": {"num_classes": 3}},
        ["student_args={'num_classes': 3}", "as many classes as the data, 10"],
    ),
    "weights of a student": (
        {"student_args": {"pretrained": True}},
        ["student_args: 'pretrained' is set by the run", "student_weights"],
    ),
    "file of a student": (
        {"student_args": {"checkpoint_path": "x.pth"}},
        ["'checkpoint_path'", "pass the file as student_weights"],
    ),
    "weights of a teacher": (
        {"teacher": "cifar_resnet8", "teacher_args": {"pretrained": False}},
        ["teacher_args: 'pretrained'", "teacher_weights"],
    ),
    "role": ({"student_args": {"role": "x"}}, ["student_args: 'role'"]),
    "no mapping": ({"student_args": 5}, ["student_args"]),
    "a list": ({"student_args": ["img_size"]}, ["student_args"]),
    "no names": ({"student_args": {3: 4}}, ["student_args"]),
    "of a module": ({"student": random(), "student_args": {"a": 1}}, ["already built"]),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_the_run_sets_itself(case):
    options, words = WRONG_OPTIONS[case]
    given = {"teacher": None, "method": "kd" if "teacher" in options else "none", **options}
    with pytest.raises(ValueError) as caught:
        call(given.pop("teacher"), given.pop("student", "cifar_resnet8"), dry_run=True, **given)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_options_that_say_the_same():
    same = {"student_args": {"num_classes": 10}, "teacher_args": {"num_classes": 10}}
    assert call("cifar_resnet8", dry_run=True, **same).student.num_classes == 10
    weights = random(classes=7).state_dict()
    plan = call(
        "cifar_resnet8", dry_run=True, teacher_args={"num_classes": 7}, teacher_weights=weights,
        teacher_head="finetune",
    ).plan  # fmt: skip
    assert "in place of 7" in str(plan)


# ------------------------------------------------------------------------ modules of other kinds
class Normed(nn.Module):
    """A network with the old weight_norm, whose `weight` is computed."""

    def __init__(self, classes: int = 7):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 8, 3, 2, 1))
            self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize(("head", "used"), [("finetune", True), ("linear-probe", False)])
def test_old_weight_norm_is_fine_tuned(head, used, few, tmp_path):
    teacher = Normed()
    if used:
        teacher(torch.rand(2, 3, 16, 16)).sum().backward()
    before = copy.deepcopy(teacher.state_dict())
    options = dict(data=few, teacher_head=head, allow_weak_teacher=True, teacher_dir=tmp_path)
    first = call(teacher, **options)
    again = call(teacher, **options)
    assert not first.metrics["teacher_finetuned_reused"]
    assert again.metrics["teacher_finetuned_reused"]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    weights = dict(teacher_weights=Normed().state_dict())
    call(teacher, **options | weights)
    call(None, Normed(10), few, method="dml")


class Normalised(nn.Module):
    """A network for images in [0, 1]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net)
        config = net.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, 3, 1, 1))

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_teaches_with_its_logits_alone(good, digits):
    whole = Normalised(good).eval()  # a script has no configuration that says mean and std
    script = torch.jit.trace(whole, torch.rand(2, 3, 16, 16))
    result = call(script, data=digits)
    assert result.metrics["teacher_top1"] == call(whole, data=digits).metrics["teacher_top1"] > 50
    for method in ("at", "srkd"):
        with pytest.raises(ValueError, match="TorchScript.*its logits teach, its features cannot"):
            call(script, data=digits, method=method)
    with pytest.raises(ValueError, match=r"TorchScript.*its logits teach, its features cannot"):
        call(script, data=digits, method="at", layers=[("layer1", "layer1")])
    with pytest.raises(ValueError, match="the student is a TorchScript module"):
        call(None, script, digits, method="none")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))


def meta() -> nn.Module:
    with torch.device("meta"):
        return random()


def inference() -> nn.Module:
    with torch.inference_mode():
        return random()


@pytest.mark.parametrize(
    ("make", "words"),
    [(lazy, "lazy modules"), (meta, "meta device"), (inference, "inference_mode")],
    ids=["lazy", "meta", "inference"],
)
def test_modules_that_cannot_be_used_are_found_first(make, words, good, digits, tmp_path):
    folder = tmp_path / "run"
    for teacher, student, options in (
        (good, make(), {}),
        (make(), random(), {}),
        (None, "cifar_resnet8", {"method": "dml", "peers": ["cifar_resnet8", make()]}),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call(teacher, student, digits, output_dir=folder, **options)
        assert "image" not in str(caught.value).replace("images of your data's size", "")
        assert not (folder / "student").exists()


def test_the_student_of_a_file_with_a_namespace(tmp_path, digits):
    import argparse

    saved = {"state_dict": random().state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, Path(tmp_path) / "m.pth.tar")
    result = call(
        None, "cifar_resnet8", digits, method="none", student_weights=tmp_path / "m.pth.tar"
    )
    assert any("tensors matched" in note for note in result.plan["notes"])
    assert load_model(result.student) is result.student
