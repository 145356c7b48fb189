"""Fine-tuning: new heads, frozen parts, rates by depth, weights of files, teachers found again."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdtoolkit import Callback, Frozen, Taps, create_method, distill
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data import Data
from kdtoolkit.data import load as load_data
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.freezing import FrozenParts
from kdtoolkit.models.head import classifier_names, replace_head
from kdtoolkit.models.layer_groups import layer_numbers
from kdtoolkit.models.loading import load_model
from kdtoolkit.models.saving import save_model
from kdtoolkit.models.weights import load_weights
from kdtoolkit.pipeline import run
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.data_info import DataInfo
from kdtoolkit.pipeline.distill import DistillResult
from kdtoolkit.pipeline.teacher_finetune import finetune_teachers, finetuned_folder
from kdtoolkit.trainer.optim import make_optimizer
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.signals import Interrupted

SMALL = dict(batch_size=32, log_every=1, progress="off", num_workers=0, max_steps=2)
SMALL |= dict(allow_weak_teacher=True)  # two steps are not enough to fine-tune one
SMALL |= dict(figures=False)  # half the time of such a run
VIT = dict(img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3)


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits", train_limit=96, validation=64)


@pytest.fixture(scope="session")
def seven(tmp_path_factory) -> Path:
    """A ResNet-8 of 7 classes as a timm folder, with its own BatchNorm statistics and mean."""
    torch.manual_seed(3)
    net = settled(timm.create_model("cifar_resnet8", num_classes=7))
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.3,) * 3, "std": (0.4,) * 3}
    return save_model(net, tmp_path_factory.mktemp("seven") / "net", input_size=(3, 16, 16))


def settled(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net.eval()


def call(teacher, student, data, **options) -> DistillResult:
    return distill(
        teacher, student, data, **{**SMALL, "method": "kd" if teacher else "none", **options}
    )


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], *parts: str) -> bool:
    """Whether all tensors whose names begin with one of `parts` are equal bit for bit."""
    names = [k for k in a if k.startswith(parts or "")]
    assert names
    return all(torch.equal(a[k], b[k]) for k in names)


class Own(nn.Module):
    """A user's network, (B, 3, H, W) to (B, classes), in a shape that no timm function knows."""

    def __init__(self, classes: int = 7):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.neck = nn.Linear(8, 8)
        self.out = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.neck(self.body(x).mean((2, 3))))


# ------------------------------------------------------------------------------------- teacher_head
def dropping() -> nn.Module:
    return timm.create_model("cifar_resnet8", num_classes=7, drop_rate=0.5)


@pytest.mark.parametrize(
    ("make", "head"), [(Own, "linear-probe"), (dropping, "linear-probe"), (Own, "finetune")]
)
def test_a_new_head_on_a_copy_of_the_callers_teacher(make, head, digits, tmp_path):
    teacher = make()
    before, flags = state(teacher), [p.requires_grad for p in teacher.parameters()]
    result = call(teacher, "cifar_resnet8", digits, teacher_head=head, teacher_dir=tmp_path)
    assert same(before, state(teacher)) and flags == [p.requires_grad for p in teacher.parameters()]
    (folder,) = tmp_path.iterdir()
    trained = load_file(folder / "student" / "model.safetensors")
    heads = tuple(classifier_names(Taps(teacher, None, 16)))
    body = {k: v for k, v in before.items() if not k.startswith(heads)}
    assert all(torch.equal(v, trained[k]) for k, v in body.items()) == (head == "linear-probe")
    assert [len(trained[f"{h}.weight"]) for h in heads] == [10]
    m = result.metrics
    assert m["teacher_finetuned_folder"] == str(folder) and m["teacher_finetuned_reused"] is False
    assert (
        m["teacher_finetuned_split"] == "test"
        and abs(m["teacher_finetuned_top1"] - m["teacher_top1"]) < 1e-9
    )
    assert any("fine-tuned" in note and str(folder) in note for note in result.plan["notes"])


def test_features_alone_and_as_is(digits):
    net = Own(7)
    pair = dict(method="sp", layers=[("layer3", "body")], teacher_head="feature-only")
    assert "teacher_top1" not in call(net, "cifar_resnet8", digits, **pair).metrics
    assert "teacher_top1" in call(Own(10), "cifar_resnet8", digits, teacher_head="as-is").metrics
    with pytest.raises(ValueError, match='the teacher has 7 classes, the data 10.*"finetune"'):
        call(net, "cifar_resnet8", digits, teacher_head="as-is")
    bare = timm.create_model("cifar_resnet8", num_classes=0)
    with pytest.raises(ValueError, match="the teacher has no classes, the data 10"):
        call(bare, "cifar_resnet8", digits)
    assert (
        call(bare, "cifar_resnet8", digits, teacher_head="linear-probe").metrics["teacher_top1"]
        >= 0
    )
    assert bare.num_classes == 0


def test_a_fine_tuned_teacher_is_found_by_another_student_and_method(seven, digits, tmp_path):
    options = dict(
        teacher_head="finetune",
        teacher_dir=tmp_path / "teachers",
        teacher_training={"max_steps": 3},
    )
    first = call(seven, "cifar_resnet8", digits, output_dir=tmp_path / "a", **options)
    (folder,) = (tmp_path / "teachers").iterdir()
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    pair = dict(method="at", freeze=1, output_dir=tmp_path / "b")
    second = call(str(seven), "cifar_resnet14", digits, **pair, **options)
    assert written == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert (
        second.metrics["teacher_finetuned_reused"] and not first.metrics["teacher_finetuned_reused"]
    )
    assert first.metrics["teacher_top1"] == second.metrics["teacher_top1"]
    assert json.loads((folder / "finetuned.json").read_text())["training"]["max_steps"] == 3
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["event"] == "train" for row in rows) == 3
    assert (folder / "report.md").exists()


def key(net: nn.Module, data: Data, **options) -> str:
    """Name of the folder of a fine-tuned teacher."""
    given = {"teacher": net, "teacher_head": "finetune", "teacher_dir": "x"} | options
    config = DistillConfig.from_keywords(**given)
    info = DataInfo(10, data.image_size, data, data.describe())
    return finetuned_folder(net, config, info).name


def test_the_folder_depends_on_all_that_a_teacher_depends_on_and_on_nothing_else(seven, digits):
    def changed(part: str) -> nn.Module:
        net = load_model(seven)
        with torch.no_grad():
            net.get_submodule(part).weight.view(-1)[0] += 0.01
        return net

    net, tensors = load_model(seven), torch.rand(64, 3, 16, 16)
    first = key(net, digits)
    again = load_data("digits", train_limit=96, validation=64)
    equal = [key(net, again), key(net, digits, progress="off", freeze=1, student="x")]
    assert equal == [first] * 2, "the way to the images and the student do not count"
    labels, split = torch.arange(64) % 10, dict(validation=20, num_classes=10)
    sets = [
        load_data(torch.utils.data.TensorDataset(x, labels), **split)
        for x in (tensors, 1 - tensors)
    ]
    other = [
        key(net, digits, **changes)
        for changes in (
            {"teacher_head": "linear-probe"},
            {"teacher_training": {"lr": 0.01}},
            {"seed": 1},
            {"epochs": 2},
        )
    ]
    other += [
        key(changed("conv1"), digits),
        key(changed("fc"), digits),
        key(settled(load_model(seven)), digits),
        *(key(net, data) for data in sets),
    ]
    other += [
        key(net, load_data("digits", train_limit=96, validation=48)),
        key(net, load_data("digits")),
    ]
    assert len({first, *other}) == 1 + len(other)


class Stop(Callback):
    """Ctrl-C as the loop sees it, once the teacher has made a step."""

    def on_step_end(self, run, step):
        run.stop = "interrupted"


def test_an_interrupted_fine_tuning_is_resumed(seven, digits, tmp_path, monkeypatch):
    def finetune(config, parts, info, accelerator, train):
        def interrupted(training):
            return train(training, callbacks=[Stop()])

        return finetune_teachers(config, parts, info, accelerator, interrupted)

    options = dict(
        teacher_head="finetune", teacher_training={"max_steps": 3}, output_dir=tmp_path / "run"
    )
    with monkeypatch.context() as patched:
        patched.setattr(run, "finetune_teachers", finetune)
        with pytest.raises(Interrupted, match="at step 1 of 3"):
            call(seven, "cifar_resnet8", digits, **options)
    (folder,) = (tmp_path / "run" / "finetuned").iterdir()
    assert not (folder / "finetuned.json").exists() and (folder / "checkpoints/last").is_dir()
    call(seven, "cifar_resnet8", digits, **options)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "train"] == [1, 2, 3]


def test_two_teachers_of_two_families_of_which_one_needs_a_head(digits, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
    own = timm.create_model("cifar_resnet8", num_classes=10)
    own.pretrained_cfg = {**own.pretrained_cfg, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    assert (
        Preprocess.from_model(vit, (16, 16)).size == (32, 32)
        and Preprocess.from_model(own, (16, 16)).mean == (0.1,) * 3
    )
    before = state(own), state(vit)
    options = dict(teacher_head=[None, "linear-probe"], teacher_dir=tmp_path, max_steps=1)
    result = call([own, vit], "cifar_resnet8", digits, **options)
    assert same(before[0], state(own)) and same(before[1], state(vit)) and vit.num_classes == 5
    assert (
        "teacher_finetuned_top1" not in result.metrics
        and "teacher/1_finetuned_top1" in result.metrics
    )
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == ["vit_tiny_patch16_224"]
    assert (
        "teacher 1 gets a new head of 10 classes in place of 5, which is trained first "
        "(linear-probe)" in [*result.plan["notes"]]
    )
    with pytest.raises(ValueError, match="teacher_head is a list of 1 for 2 teachers"):
        call([own, vit], "cifar_resnet8", digits, teacher_head=["finetune"])


def test_a_teacher_whose_classes_fit_is_trained_where_that_is_asked(digits, tmp_path):
    """Its head may be random: timm gives one for any number of classes."""
    own = load_model("cifar_resnet8", num_classes=10)
    before = state(own)
    result = call(
        own, "cifar_resnet8", digits, teacher_head="finetune", teacher_dir=tmp_path, max_steps=2
    )
    assert (
        "the teacher keeps its head of 10 classes, and is trained first (finetune)"
        in result.plan["notes"]
    )
    assert result.metrics["teacher_finetuned_reused"] is False and same(before, state(own))
    (folder,) = tmp_path.iterdir()
    trained = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True)
    assert not same(before, state(trained))


def test_what_only_attributes_tell_makes_another_teacher(digits):
    one, two = (
        load_model("vit_tiny_patch16_224", num_classes=5, **{**VIT, "num_heads": heads})
        for heads in (1, 2)
    )
    two.load_state_dict(one.state_dict())
    assert key(one, digits) != key(two, digits) and key(one, digits) == key(
        copy.deepcopy(one), digits
    )


def test_flags_of_a_teacher_that_is_trained_first(digits):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fc, self.spare = (
                load_model("cifar_resnet8", num_classes=0),
                nn.Linear(64, 7),
                nn.Linear(3, 3),
            )

        def forward(self, x):
            return self.fc(self.net(x))

    own = Spare()
    own.spare.requires_grad_(False)  # what its owner froze stays so
    call(own, "cifar_resnet8", digits, teacher_head="finetune", max_steps=1)
    call(
        load_model("cifar_resnet8", num_classes=7).requires_grad_(False),
        "cifar_resnet8",
        digits,
        teacher_head="finetune",
    )
    half = load_model("cifar_resnet8", num_classes=7).to(
        torch.bfloat16
    )  # trained in float32, as a copy
    call(half, "cifar_resnet8", digits, teacher_head="finetune", max_steps=1)
    assert half.fc.weight.dtype == torch.bfloat16


def test_a_refused_or_dry_run_leaves_the_weights_of_a_student_alone(digits):
    student = load_model("cifar_resnet8", num_classes=10)
    before, ones = state(student), {k: torch.ones_like(v) for k, v in student.state_dict().items()}
    call(None, student, digits, method="none", student_weights=ones, dry_run=True)
    assert same(before, state(student))
    with pytest.raises(ValueError, match="'nope' is no module"):
        call(None, student, digits, method="none", student_weights=ones, freeze="nope")
    assert same(before, state(student))


def test_tied_weights_are_kept_and_gone_on_from(digits, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = (
                nn.Conv2d(3, 8, 3, 2, 1),
                nn.Conv2d(8, 8, 3),
                nn.Conv2d(8, 8, 3),
            )
            self.b.weight, self.fc = self.a.weight, nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(self.b(self.a(self.stem(x)).relu()).mean((2, 3)))

    class Once(Callback):
        def on_epoch_end(self, run, metrics):
            run.stop = "interrupted" if run.clock.epoch == 1 else run.stop

    options = dict(method="none", output_dir=tmp_path / "run", epochs=2, max_steps=None)
    with pytest.raises(Interrupted):
        call(None, Tied(), digits, callbacks=[Once()], **options)
    result = call(None, Tied(), digits, resume="auto", **options)
    assert result.metrics["epoch"] >= 1 and result.student.a.weight is result.student.b.weight


def test_another_teacher_or_option_is_another_run(digits, tmp_path):
    options = dict(output_dir=tmp_path / "run", max_steps=2)
    first = load_model("cifar_resnet8", num_classes=10)
    call(first, "cifar_resnet8", digits, **options)
    with pytest.raises(CheckpointError, match="another run: networks.*teachers"):
        call(
            settled(load_model("cifar_resnet8", num_classes=10)),
            "cifar_resnet8",
            digits,
            resume="auto",
            **options,
        )
    with pytest.raises(CheckpointError, match="another run: options"):
        call(first, "cifar_resnet8", digits, resume="auto", temperature=2.0, **options)


def test_a_damaged_teacher_says_what_to_do(seven, digits, tmp_path):
    options = dict(teacher_head="linear-probe", teacher_dir=tmp_path, max_steps=1)
    call(seven, "cifar_resnet8", digits, **options)
    (folder,) = tmp_path.iterdir()
    (folder / "student/model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match="fine-tuned teacher in .* cannot be loaded .*delete the folder"
    ):
        call(seven, "cifar_resnet8", digits, **options)


# ------------------------------------------------------------------------------------------- freeze
FROZEN = [
    (2, ("conv1", "bn1", "layer1", "layer2"), ("layer3", "fc")),
    (["layer1", "bn1"], ("layer1", "bn1"), ("conv1", "layer2", "fc")),
    ("conv1,layer2.0", ("conv1", "layer2.0"), ("layer1", "fc")),
    ("backbone", ("conv1", "bn1", "layer"), ("fc",)),
]


@pytest.mark.parametrize(("what", "still", "moving"), FROZEN, ids=[str(f[0]) for f in FROZEN])
def test_what_is_frozen_stays_bit_for_bit(what, still, moving, digits):
    torch.manual_seed(0)
    net = settled(timm.create_model("cifar_resnet8", num_classes=10)).train()
    net.fc.bias.requires_grad_(False)
    before = state(net)
    pair = dict(method="fitnet", layers=[("layer3", "body")])
    result = call(Own(10), net, digits, freeze=what, max_steps=None, epochs=2, **pair)
    after = state(net)
    assert same(before, after, *still)
    assert not any(same(before, after, part) for part in moving)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["fc.bias"]
    inside = sum(p.numel() for n, p in net.named_parameters() if n.startswith(still))
    assert result.plan["parameters"]["frozen in the student"] == inside
    assert "frozen in the student" in str(result.plan)


def test_stages_of_a_vit_take_tokens_and_positions_along():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    still = FrozenParts(Taps(net, None, 32), 2)
    names = {n for n, p in net.named_parameters() if any(p is q for q in still.parameters)}
    loose = {n for n in names if not n.startswith("blocks.")}
    assert loose == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {n.split(".")[1] for n in names - loose} == {"0", "1"}
    still.apply()
    net.train()
    still.set_eval_mode()
    assert not net.blocks[1].mlp.training and net.blocks[2].mlp.training and net.training
    still.release()
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["pit_ti_224", "hrnet_w18_small"])
def test_stages_that_end_in_several_tensors(name):
    with torch.device("meta"):
        taps = Taps(timm.create_model(name, num_classes=10), None, 224)
    every = sum(p.numel() for p in taps.model.parameters())
    counts = [FrozenParts(taps, stage).num_parameters for stage in range(1, len(taps.stages) + 1)]
    assert (
        counts == sorted(set(counts))
        and counts[0] > 0
        and counts[-1] < every - taps.model.num_features * 10
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (9, ["freeze=9", "ResNet has 3 stages"]),
        (0, ["freeze=0", "number from 1"]),
        (True, ["freeze=True", "'backbone'"]),
        ([], ["freeze=[]"]),
        ("bakbone", ["did you mean 'backbone'"]),
        (
            ["layr1"],
            ["freeze: 'layr1' is no module of ResNet", "layer1, layer2", "did you mean 'layer1'"],
        ),
        (
            ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"],
            ["leaves no parameter of ResNet to train", "'backbone'"],
        ),
    ],
)
def test_what_cannot_be_frozen(what, words):
    with pytest.raises(ValueError) as caught:
        call(None, "cifar_resnet8", "digits", freeze=what, dry_run=True)
    assert not [w for w in words if w not in str(caught.value)], caught.value


def test_a_backbone_needs_a_classifier():
    with pytest.raises(ValueError, match="no classifier was found in Sequential"):
        FrozenParts(Taps(nn.Sequential(Own(), nn.ReLU()), None, 16), "backbone")


# -------------------------------------------------------------------------------------- layer_decay
def rates_of(
    net: nn.Module, optimizer: str, decay: float
) -> tuple[dict[int, tuple[float, float]], dict[str, int]]:
    """(lr, weight_decay) by the parameter's id, and layer by name.

    A FitNet adapter is trained beside the network.
    """
    size = Preprocess.from_model(net, (32, 32)).size or (32, 32)
    student, teacher = (
        Taps(net, None, size),
        Frozen(timm.create_model("cifar_resnet8", num_classes=10), None, 32),
    )
    method = create_method("fitnet", student, [teacher], image=(32, 32))
    layers = layer_numbers(student)
    made = make_optimizer(
        method,
        TrainerConfig(optimizer=optimizer, lr=0.1, weight_decay=0.01, layer_decay=decay),
        layers,
    )
    method.release()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    assert set(rates) == {id(p) for p in method.parameters()}
    own = {id(p) for p in net.parameters()}
    assert {rates[id(p)][0] for p in method.parameters() if id(p) not in own} == {0.1}, (
        "adapters at the full rate"
    )
    return rates, layers


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "cifar_resnet8"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_by_depth(name, optimizer):
    net = timm.create_model(name, num_classes=10, **(VIT if "vit" in name else {}))
    rates, layers = rates_of(net, optimizer, 0.5)
    deepest = max(layers.values())
    assert deepest >= 3 and sorted(set(layers.values())) == list(range(deepest + 1))
    for n, p in net.named_parameters():
        lr, decay = rates[id(p)]
        assert lr == pytest.approx(0.1 * 0.5 ** (deepest - layers[n]))
        free = optimizer == "adamw" and (p.ndim <= 1 or n in ("pos_embed", "cls_token"))
        assert decay == (0.0 if free else 0.01), n
    (head,) = classifier_names(Taps(net, None, 32))
    assert rates[id(net.get_submodule(head).weight)][0] == 0.1
    first = next(iter(net.parameters()))
    assert rates[id(first)][0] == pytest.approx(0.1 * 0.5**deepest)


def test_rates_are_those_of_timm():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    rates, _ = rates_of(net, "adamw", 0.65)
    for group in timm.optim.param_groups_layer_decay(
        net, 0.01, net.no_weight_decay(), layer_decay=0.65
    ):
        for p in group["params"]:
            assert rates[id(p)] == (pytest.approx(0.1 * group["lr_scale"]), group["weight_decay"])


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_losses(self, run, step, batch):
        self.seen.append(sorted({g["lr"] for g in run.optimizer.param_groups}))


def test_the_schedule_scales_every_rate_and_a_resumed_run_goes_on(digits, tmp_path):
    rates = Rates()
    options = dict(
        layer_decay=0.5, freeze=1, lr=0.1, max_steps=4, scheduler="linear", optimizer="adamw"
    )
    whole = call(None, "cifar_resnet8", digits, callbacks=[rates], **options)
    for step, seen in enumerate(rates.seen):
        assert seen == pytest.approx([0.1 * (1 - step / 4) * 0.5**depth for depth in (2, 1, 0)])
    first = next(row for row in whole.history if row["event"] == "train")
    assert first["lr"] == pytest.approx(0.1)  # of the step that was made, the first
    with pytest.raises(Interrupted):
        call(None, "cifar_resnet8", digits, callbacks=[Stop()], output_dir=tmp_path, **options)
    resumed = call(None, "cifar_resnet8", digits, output_dir=tmp_path, resume=True, **options)
    assert same(state(whole.student), state(resumed.student))


@pytest.mark.parametrize("decay", [0, 1.5, "0.5", True])
def test_factors_that_are_refused(decay):
    with pytest.raises(ValueError, match="layer_decay is .*above 0 up to 1"):
        call(None, "cifar_resnet8", "digits", layer_decay=decay, dry_run=True)


# ------------------------------------------------------------------------------------------ weights
def test_a_student_folder_of_other_classes_keeps_its_body(seven, digits, tmp_path):
    result = call(
        None, f"local-dir:{seven}", digits, freeze="backbone", output_dir=tmp_path / "run"
    )
    net = load_model(seven)
    assert same(state(net), state(result.student), "conv1", "bn1", "layer")
    assert result.student.num_classes == 10 and "a new head of 10 classes in place of 7" in str(
        result.plan
    )
    back = timm.create_model(f"local-dir:{tmp_path}/run/student", pretrained=True).eval()
    x = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(back(x), result.student(x))
    assert list(back.pretrained_cfg["mean"]) == [0.3] * 3 and tuple(
        back.pretrained_cfg["input_size"]
    ) == (3, 16, 16)


def test_a_student_file_of_other_classes_keeps_its_body(seven, digits, tmp_path):
    net = load_model(seven)
    about = dict(architecture="cifar_resnet8", num_classes="7", mean="0.1,0.2,0.3", std="1,2,4")
    save_file(net.state_dict(), tmp_path / "a.safetensors", about)
    result = call(None, str(tmp_path / "a.safetensors"), digits, freeze="backbone")
    assert same(state(net), state(result.student), "conv1", "bn1", "layer")
    assert result.student.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)


def sources(net: nn.Module, tmp: Path) -> dict[str, object]:
    """The same weights in all the wrappings that they come in."""
    tensors = net.state_dict()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}, tmp / "a.pth"
    )
    torch.save(
        {f"student.{k}": v for k, v in tensors.items()} | {"losses.x": torch.zeros(2)},
        tmp / "b.pt",
    )
    save_file(tensors, tmp / "c.safetensors", {"mean": "0.1,0.2,0.3", "std": "1,2,4"})
    folder = save_model(net, tmp / "folder")
    return {
        "dict": tensors,
        "pth": tmp / "a.pth",
        "pt": str(tmp / "b.pt"),
        "file": tmp / "c.safetensors",
        "folder": folder,
        "model": {"model": tensors, "optimizer": {}},
    }


@pytest.mark.parametrize("kind", ["dict", "pth", "pt", "file", "folder", "model"])
def test_weights_of_every_kind(kind, seven, tmp_path):
    net = load_model(seven)
    source = sources(net, tmp_path)[kind]
    other = timm.create_model("cifar_resnet8", num_classes=10)
    line = load_weights(other, source, role="student")
    assert same(state(net), state(other), "conv1", "bn1", "layer") and other.num_classes == 10
    assert (
        "54 of 56 tensors matched; missing: none" in line
        and "fc.weight (7, 64) for (10, 64)" in line
    )
    assert line.endswith("it gets a new classifier")
    assert (other.pretrained_cfg["mean"][0] == 0.1) == (kind == "file")
    teacher = timm.create_model("cifar_resnet8")
    assert load_weights(teacher, source, role="teacher", keep_head=True).startswith("teacher: ")
    assert teacher.num_classes == 7 and same(state(net), state(teacher))


def test_weights_go_through_distill(seven, digits, tmp_path, caplog):
    net = load_model(seven)
    options = dict(
        student_weights=net.state_dict(),
        teacher_weights=seven,
        teacher_head="linear-probe",
        freeze="backbone",
        progress="lines",
        output_dir=tmp_path / "run",
    )
    with caplog.at_level("INFO", "kdtoolkit"):
        result = call("cifar_resnet8", "cifar_resnet8", digits, **options)
    assert same(state(net), state(result.student), "conv1", "bn1", "layer")
    assert caplog.text.count("student: a state dict: 54 of 56 tensors matched") == 1
    assert f"teacher: {seven}: 56 of 56" in caplog.text
    assert any("54 of 56 tensors" in note for note in result.plan["notes"])
    assert "state dict of 56 tensors" in (tmp_path / "run/config.yaml").read_text()
    own, before = Own(10), Own(10)
    held = state(own)
    call(
        own,
        before,
        digits,
        teacher_weights=Own(10).state_dict(),
        student_weights=held,
        freeze=["body"],
    )
    assert same(held, state(own)) and same(held, state(before), "body"), (
        "the teacher is a copy, the student is trained"
    )


def test_weights_without_a_classifier_leave_a_teacher_without(seven):
    body = {k: v for k, v in load_model(seven).state_dict().items() if not k.startswith("fc")}
    teacher = timm.create_model("cifar_resnet8")
    load_weights(teacher, body, role="teacher", keep_head=True)
    assert teacher.num_classes == 0


def not_weights(tmp: Path) -> dict[str, tuple[object, list[str]]]:
    (tmp / "text.pth").write_text("no")
    torch.save({"epoch": 3}, tmp / "empty.pth")
    torch.save({"state_dict": Own}, tmp / "code.pth")
    foreign = {f"blocks.{i}.weight": torch.zeros(2) for i in range(9)}
    half = {
        k: v
        for k, v in timm.create_model("cifar_resnet8").state_dict().items()
        if k.startswith(("conv1", "bn1"))
    }
    return {
        "nowhere": (tmp / "no.pth", ["there is no file or folder"]),
        "text": (
            tmp / "text.pth",
            ["text.pth cannot be read", "a .safetensors file, or a .pth, .pt"],
        ),
        "empty": (tmp / "empty.pth", ["no tensors are in it, but epoch"]),
        "code": (tmp / "code.pth", ["cannot be read", "tensors alone"]),
        "module": (Own(), ["is a Own", "state_dict()"]),
        "foreign": (
            foreign,
            ["fits 0%", "0 of 47", "blocks.0.weight", "conv1.weight", "student_args"],
        ),
        "little": (half, ["fits 1%", "6 of 48", "missing: layer1.0.conv1.weight"]),
    }


@pytest.mark.parametrize(
    "kind", ["nowhere", "text", "empty", "code", "module", "foreign", "little"]
)
def test_what_is_no_weights(kind, tmp_path):
    source, words = not_weights(tmp_path)[kind]
    net = timm.create_model("cifar_resnet8", num_classes=10)
    before = state(net)
    with pytest.raises(ValueError) as caught:
        call(None, net, "digits", student_weights=source, dry_run=True)
    assert not [w for w in ["student_weights", *words] if w not in str(caught.value)], caught.value
    assert same(before, state(net))


def test_weights_at_another_image_and_patch_size(digits, tmp_path):
    torch.manual_seed(0)
    vit = settled(timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT))
    folder = save_model(vit, tmp_path / "vit")
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": "10"}
    save_file(vit.state_dict(), tmp_path / "vit.safetensors", about)
    wanted = timm.layers.resample_abs_pos_embed(vit.pos_embed, [8, 8])
    kept = {k: v for k, v in VIT.items() if k not in ("img_size", "patch_size")}
    for spec, args in ((folder, {}), (tmp_path / "vit.safetensors", kept)):
        big = load_model(spec, img_size=64, patch_size=8, **args)
        assert torch.allclose(big.pos_embed, wanted) and torch.equal(
            big.head.weight, vit.head.weight
        )
        coarse = load_model(spec, img_size=64, patch_size=16, **args)
        assert coarse.patch_embed.proj.weight.shape[-1] == 16 and torch.equal(
            coarse.pos_embed, vit.pos_embed
        )
    other = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT | {"img_size": 64})
    assert "56 of 56" in load_weights(other, vit.state_dict(), role="student") and torch.allclose(
        other.pos_embed, wanted
    )
    result = call(
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224",
        digits,
        teacher_weights=folder,
        student_weights=folder,
        student_args=VIT | {"img_size": 64},
        teacher_args=[VIT | {"img_size": 16, "patch_size": 4}],
        max_steps=1,
        output_dir=tmp_path / "run",
    )
    back = timm.create_model(f"local-dir:{tmp_path}/run/student", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(back(x), result.student(x))


# ------------------------------------------------------------------------------- dry runs, refusals
def test_a_dry_run_shows_it_all(seven, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = call(
        seven,
        seven,
        "digits",
        freeze=1,
        layer_decay=0.5,
        lr=0.1,
        teacher_head="finetune",
        dry_run=True,
        teacher_training={"epochs": 3, "optimizer": "adamw"},
        student_weights=load_model(seven).state_dict(),
    ).plan
    text = " ".join(str(plan).split())
    for words in (
        "frozen in the student",
        "layer_decay 0.5 over 3 layers: lr 0.025 to 0.1",
        "the student gets a new head of 10 classes in place of 7",
        "the teacher gets a new head of 10 classes in place of 7, which is trained first "
        "(finetune)",
        "fine-tuning of a teacher: 3 epochs, batch_size 32, adamw, lr 0.001",
        "student: a state dict: 54 of 56",
    ):
        assert words in text, words
    assert not list(tmp_path.iterdir())
    sizes = dict(
        student_args={"img_size": 32, "patch_size": 4}, teacher_head="linear-probe", dry_run=True
    )
    plan = call(
        "vit_base_patch14_dinov2.lvd142m", "vit_tiny_patch16_224.augreg_in21k", "cifar10", **sizes
    ).plan
    assert "new head of 10 classes in place of 21843" in str(plan) and "in place of 0" in str(plan)


REFUSED = [
    (
        dict(teacher_training={"epoch": 3}, teacher_head="finetune"),
        ["unknown 'epoch'", "mean 'epochs'", "freeze"],
    ),
    (dict(teacher_training={"epochs": 3}), ["no effect with teacher_head=None", "'linear-probe'"]),
    (dict(teacher_training={"freeze": 1}, teacher_head="linear-probe"), ["freeze has no effect"]),
    (dict(teacher_training={"lr": -1}, teacher_head="finetune"), ["lr is -1"]),
    (dict(teacher_weights=[{}, {}]), ["teacher_weights is a list of 2 for 1 teachers"]),
    (dict(teacher_args=[{}, {}]), ["teacher_args is a list of 2"]),
    (dict(teacher=[Own(10), Own(10)], teacher_weights={}), ["given once for 2 teachers"]),
    (
        dict(teacher=Own(10), teacher_args={"depth": 2}),
        ["teacher_args={'depth': 2} has no effect", "already built"],
    ),
    (dict(student=Own(10), student_args={"depth": 2}), ["student_args={'depth': 2} has no effect"]),
    (dict(teacher=Own(10), teacher_weights=Own(7).state_dict()), ["holds 7 classes, Own has 10"]),
]


@pytest.mark.parametrize(
    ("options", "words"), REFUSED, ids=[" ".join(words) for _, words in REFUSED]
)
def test_refused_with_what_is_allowed(options, words, tmp_path):
    given = {
        "teacher": Own(10),
        "student": "cifar_resnet8",
        "output_dir": tmp_path / "run",
    } | options
    with pytest.raises(ValueError) as caught:
        call(given.pop("teacher"), given.pop("student"), "digits", **given)
    assert not [w for w in words if w not in str(caught.value)], caught.value
    assert not (tmp_path / "run").exists()


def test_a_new_head_depends_on_the_seed_alone():
    nets = [timm.create_model("cifar_resnet8", num_classes=7) for _ in range(2)]
    for i, net in enumerate(nets):
        torch.rand(i + 1)
        replace_head(Taps(net, None, 16), 10, seed=5)
    assert torch.equal(nets[0].fc.weight, nets[1].fc.weight)


def test_the_recipe_runs_and_finds_itself_done(seven, tmp_path, monkeypatch, capsys):
    recipe = Path(__file__).parents[2] / "recipes/finetune_kd.py"
    flags = "--source digits --source-rows 128 --source-epochs 1 --dataset digits --rows 64"
    flags += " --epochs 1 --batch-size 32 --allow-weak-teacher"
    flags += f" --student cifar_resnet8 --teacher {seven} --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", [str(recipe), *flags.split()])
    runpy.run_path(str(recipe), run_name="__main__")
    first = capsys.readouterr().out.partition("top-1 on the test set")[2]
    assert all(arm in first for arm in ("scratch", "alone", "distilled", "teacher"))
    rows = (tmp_path / "distilled/seed0/metrics.jsonl").read_text().count('"train"')
    runpy.run_path(str(recipe), run_name="__main__")
    assert capsys.readouterr().out.partition("top-1 on the test set")[2] == first
    assert (tmp_path / "distilled/seed0/metrics.jsonl").read_text().count('"train"') == rows
