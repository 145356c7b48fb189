"""SOKD: a trained branch on a frozen teacher; the teacher is given back as it was."""

import copy

import paper_totals
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kdtoolkit import functional
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.factory import create_method
from kdtoolkit.methods.sokd import SOKD, TERMS
from kdtoolkit.types import Clock

VIT = {"img_size": 48, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
IMAGE = (32, 32)


def net(name, seed=0, classes=10, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes, **options)


def teacher_net(family="cifar_resnet14", seed=1):
    made = {
        "cifar_resnet14": lambda: net("cifar_resnet14", seed),
        "vit": lambda: net("vit_tiny_patch16_224", seed, **VIT),
        "convnext": lambda: net("convnext_atto", seed, **CONVNEXT),
    }[family]()
    with torch.no_grad():  # BatchNorm statistics that say something
        made.train()(torch.randn(16, 3, 48, 48))
    return made.eval()


def method_of(family="cifar_resnet14", teacher=None, **options):
    teacher = teacher_net(family) if teacher is None else teacher
    student = net("cifar_resnet8")
    frozen = Frozen(teacher, None, 48 if family == "vit" else 32, image=IMAGE)
    return create_method("sokd", Taps(student, None, 32), [frozen], image=IMAGE, **options)


def batch_of(count=8):
    data = load_digits()
    x = torch.tensor(data.images[:count, None] / 16, dtype=torch.float32)
    return {
        "x": F.interpolate(x, IMAGE, mode="bilinear").expand(-1, 3, -1, -1),
        "y": torch.tensor(data.target[:count]),
    }


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("start", ["teacher", "random"])
@pytest.mark.parametrize("family", ["cifar_resnet14", "vit", "convnext"])
def test_the_sum_is_the_papers_and_reaches_what_is_trained(family, start, mode):
    method, batch = method_of(family, start=start, teacher_mode=mode), batch_of()
    teacher = method.teachers[0]
    step = method(batch, Clock())
    assert list(step.losses) == list(TERMS) and list(step.logits) == ["student", "branch"]
    target = teacher(batch["x"]).logits
    if mode == "train":
        target = copy.deepcopy(method.drift)(teacher.preprocess(batch["x"])).logits
    want = paper_totals.sokd(step.logits["student"], step.logits["branch"], target, batch["y"])
    torch.testing.assert_close(sum(step.losses.values()), want, rtol=1e-5, atol=1e-6)
    sum(step.losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    assert all(p.grad is None for p in teacher.model.parameters())
    assert method.drift is None or all(p.grad is None for p in method.drift.taps.model.parameters())
    behind = sum(p.numel() for p in method.branch.parameters())
    assert 0 < behind < sum(p.numel() for p in teacher.model.parameters())
    assert method.plan()["parameters"]["branch"] == behind


@pytest.mark.parametrize("family", ["cifar_resnet14", "vit"])
def test_the_branch_starts_as_the_teacher_or_anew(family):
    copied, drawn = (method_of(family, start=s).eval() for s in ("teacher", "random"))
    x, teacher = batch_of()["x"], copied.teachers[0]
    with torch.no_grad():
        logits = teacher(x).logits
        assert torch.equal(copied.logits("branch", x), logits)
        assert not torch.equal(drawn.logits("branch", x), logits)
        for method in (copied, drawn):  # a complete network
            whole = method.networks()["branch"]
            assert torch.equal(whole(teacher.preprocess(x)), method.logits("branch", x))
            plain = teacher_net(family, seed=5)
            plain.load_state_dict(whole.state_dict())
            assert torch.equal(plain(teacher.preprocess(x)), method.predict(x)["branch"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teacher_is_given_back_bit_for_bit(mode):
    given = teacher_net().train()
    before, flags = copy.deepcopy(given.state_dict()), [p.requires_grad for p in given.parameters()]
    method = method_of(teacher=given, teacher_mode=mode)
    own = {id(t) for t in (*given.parameters(), *given.buffers())}
    nets = method.networks().values()
    assert not any(id(t) in own for n in nets for t in (*n.parameters(), *n.buffers()))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for _ in range(3):
        sum(method(batch_of(), Clock()).losses.values()).backward()
        optimizer.step()
    method.release()
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    assert given.training and [p.requires_grad for p in given.parameters()] == flags
    assert not any(m._forward_hooks for n in (given, *nets) for m in n.modules())


def test_train_mode_drifts_and_is_saved():
    method, batch = method_of(teacher_mode="train"), batch_of()
    before = copy.deepcopy(method.state_dict())
    statistics = [k for k in before if k.startswith("drift.")]
    method(batch, Clock())
    assert statistics and any(
        not torch.equal(before[k], v) for k, v in method.state_dict().items() if "drift" in k
    )
    assert method.networks()["branch"].layer1 is method.drift.taps.model.layer1
    other = method_of(teacher_mode="train")
    other.load_state_dict(method.state_dict())
    other.eval(), method.eval()
    assert torch.equal(
        other.drift.taps.model.bn1.running_mean, method.drift.taps.model.bn1.running_mean
    )
    with torch.no_grad():
        assert torch.equal(other.logits("branch", batch["x"]), method.logits("branch", batch["x"]))
        whole = method.networks()["branch"](method.teachers[0].preprocess(batch["x"]))
        assert torch.equal(whole, method.logits("branch", batch["x"]))
    assert method_of().drift is None and not any("drift" in k for k in method_of().state_dict())
    method.place_teachers(torch.device("cpu"))
    method.double()
    assert method.drift.taps.model.bn1.running_mean.dtype == torch.float64


@pytest.mark.parametrize(
    "options", [{}, {"teacher_mode": "train"}, {"losses": {"ce": 1.0, "feature": 1.0}}], ids=str
)
def test_copies(options):
    method, batch = method_of(**options), batch_of()
    twin = copy.deepcopy(method)
    own = {id(t) for t in (*method.parameters(), *method.buffers())}
    assert not any(id(t) in own for t in (*twin.parameters(), *twin.buffers()))
    mine, its = method(batch, Clock()), twin(batch, Clock())
    assert all(torch.equal(mine.losses[k], its.losses[k]) for k in mine.losses)
    for p in method.parameters():
        nn.init.normal_(p, std=0.05)
    again = twin(batch, Clock())
    assert torch.equal(again.logits["student"], its.logits["student"])
    assert torch.equal(again.logits["branch"], its.logits["branch"])


def test_features():
    method, batch = method_of(losses=dict.fromkeys(TERMS, 1.0) | {"feature": 1.0}), batch_of()
    step = method(batch, Clock())
    assert list(step.losses) == [*TERMS, "feature"]
    gradients = torch.autograd.grad(
        step.losses["feature"],
        list(method.branch.parameters()),
        allow_unused=True,
        retain_graph=True,
    )
    assert all(g is None for g in gradients)
    step.losses["feature"].backward()
    assert all(p.grad is not None for p in method.student.layer1.parameters())
    row = method.plan()["losses"][-1]
    assert (row["student"], row["teacher"], row["adapter"]) == (
        "layer3.0",
        "branch layer3.1",
        "identity",
    )
    assert (
        method_of("convnext", losses={"ce": 1.0, "feature": 1.0})(batch, Clock()).losses["feature"]
        > 0
    )


def test_mixed_precision():
    """The teacher's BatchNorms are folded; features come in bfloat16 and the branch's weights stay
    as they are."""
    method, batch = method_of(), batch_of()
    method.place_teachers(torch.device("cpu"), torch.channels_last, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        step = method(batch, Clock())
    sum(step.losses.values()).backward()
    assert {p.grad.dtype for p in method.parameters()} == {torch.float32}
    conv = method.networks()["branch"].layer1[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, {"start": "random", "teacher_mode": "train"}], ids=str)
def test_thirty_steps_overfit(options):
    teacher, batch = net("cifar_resnet8", 1), batch_of(16)
    x = Preprocess.from_model(teacher)(batch["x"])
    overfit(teacher, lambda: functional.ce(teacher(x), batch["y"]))
    with torch.no_grad():  # its statistics lag behind its weights
        for _ in range(30):
            teacher(x)
    method = method_of(teacher=teacher, **options)
    overfit(method, lambda: sum(method(batch, Clock()).losses.values()))
    hits = {
        n: (z.argmax(1) == batch["y"]).float().mean().item()
        for n, z in method(batch, Clock()).logits.items()
    }
    assert min(hits.values()) >= 0.9, hits


def overfit(module, loss):
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_a_half_precision_teacher():
    method = method_of(teacher=teacher_net().bfloat16())
    step = method(batch_of(), Clock())
    assert step.logits["branch"].dtype == torch.float32
    assert {p.dtype for p in method.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: method_of(start="copy"), "start is 'copy'; allowed: 'teacher', 'random'"),
        (lambda: method_of(teacher_mode="eva"), "teacher_mode is 'eva'; allowed"),
        (lambda: method_of(cut="conv9"), "tap 'conv9' is not a module"),
        (lambda: method_of(cut="layer3.0.conv1"), "cannot reset"),
        (
            lambda: method_of(cut=-1, losses={"ce": 1.0, "feature": 1.0}),
            "the branch has no feature",
        ),
        (lambda: method_of(temperature=0), "temperature is .*; allowed: a finite number above 0"),
        (lambda: method_of(losses={"kdd": 1.0}), "unknown loss 'kdd'"),
        (
            lambda: method_of(teacher=net("cifar_resnet8", classes=7)),
            "the teacher has 7 classes, the student 10",
        ),
        (
            lambda: create_method("sokd", Taps(net("cifar_resnet8"), None, 32)),
            "needs a teacher, none was given",
        ),
        (
            lambda: create_method(
                "sokd", Taps(net("cifar_resnet8"), None, 32), [Frozen(teacher_net(), None, 32)] * 2
            ),
            "SOKD has one teacher, 2 were given",
        ),
        (
            lambda: SOKD(
                Taps(net("cifar_resnet8"), None, 32),
                Frozen(teacher_net(), None, 32),
                weights={"x": 1},
            ),
            "weights of SOKD: unknown loss 'x'",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()
