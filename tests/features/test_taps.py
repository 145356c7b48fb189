"""Taps and Frozen on real networks: what is measured, stored, replaced, skipped and refused."""

import copy
import functools
import io
import pickle
import re
import time
import warnings

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdtoolkit.models  # noqa: F401  (registers the cifar nets with timm)
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.model_inputs import fixed_size, normalisation
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.factory import create_method
from kdtoolkit.types import Clock

NETS = {  # name -> (keywords, image size, stages)
    "resnet10t": ({}, 64, 5),
    "cifar_wrn16_1": ({}, 32, 3),
    "cifar_resnet8": ({}, 32, 3),
    "cifar_vgg8": ({}, 32, 5),
    "cifar_densenet40_12": ({}, 32, 3),
    "cifar_mobilenetv2_half": ({}, 32, 4),
    "cifar_shufflenetv1": ({}, 32, 3),
    "vgg11": ({"mlp_ratio": 0.02}, 64, 6),
    "densenet121": ({}, 64, 5),
    "mobilenetv3_small_050": ({}, 64, 5),
    "convnext_atto": ({}, 64, 4),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, 64, 4),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)},
        64,
        4,
    ),
    "mixer_s32_224": ({"img_size": 64}, 64, 4),
    "pit_ti_224": ({"img_size": 64}, 64, 3),
}
FOREIGN = {
    "torchvision_resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64, 5),
    "torchvision_vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 5, 2, 32, 64, num_classes=10),
        64,
        4,
    ),
    "own": (lambda: Own(), 32, 3),
}
SEVERAL = {"pit_ti_224"}  # stages that end in more than one tensor
ALL = [n for n in [*NETS, *FOREIGN] if n not in SEVERAL]
RESIDUAL = [
    "resnet10t",
    "cifar_wrn16_1",
    "cifar_densenet40_12",
    "convnext_atto",
    "vit_tiny_patch16_224",
]


class Own(nn.Module):
    """A user's module without any metadata."""

    def __init__(self, inplace=False):
        super().__init__()
        sizes = [(3, 8), (8, 12), (12, 16)]
        self.features = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(inplace))
            for i, o in sizes
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        for block in self.features:
            x = block(x)
        return self.head(self.drop(x.mean((2, 3))))


@functools.cache
def net(name):
    torch.manual_seed(0)
    if name in FOREIGN:
        model = FOREIGN[name][0]()
    else:
        model = timm.create_model(name, num_classes=10, **NETS[name][0])
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)  # heads that start at zero
    return model.eval()


def size_of(name):
    return (NETS.get(name) or FOREIGN[name])[1]


def images(name, count=2, seed=0):
    size = size_of(name)
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tapped(request):
    taps = Taps(net(request.param), size=size_of(request.param))
    yield request.param, taps
    taps.remove_hooks()
    assert not any(m._forward_hooks for m in taps.model.modules())


every_net = pytest.mark.parametrize("tapped", ALL, indirect=True)


# --- structure and shapes
@every_net
@torch.no_grad()
def test_stages_and_shapes_are_those_of_a_real_forward(tapped):
    name, taps = tapped
    assert len(taps.stages) == (NETS.get(name) or FOREIGN[name])[2]
    assert taps.keys == list(range(1, len(taps.stages) + 1))
    seen = {}
    handles = [
        taps.model.get_submodule(end).register_forward_hook(
            lambda m, a, out, k=k: seen.setdefault(k, out)
        )
        for k, end in taps.names.items()
    ]
    x = images(name)
    taps.model(x)
    for handle in handles:
        handle.remove()
    for key, shape in taps.shapes.items():
        assert tuple(seen[key].shape) == (2, *shape)
        assert taps.strides[key] == x.shape[2] / shape.grid[0]
        positions = shape.grid[0] * shape.grid[1] + shape.prefix
        assert shape.channels * positions == seen[key][0].numel()
    assert list(taps.strides.values()) == sorted(taps.strides.values())


def test_layouts():
    layouts = {
        n: Taps(net(n), (-1,), size_of(n))
        for n in ("resnet10t", "swin_tiny_patch4_window7_224", "mixer_s32_224")
    }
    assert [t.shapes[t.keys[0]].layout for t in layouts.values()] == ["NCHW", "NHWC", "NLC"]
    vit = Taps(net("vit_tiny_patch16_224"), (1,))
    assert (vit.shapes[1].layout, vit.shapes[1].prefix, vit.shapes[1].grid) == ("NLC", 1, (4, 4))
    for taps in (vit, *layouts.values()):
        taps.remove_hooks()


@pytest.mark.parametrize("name, given, fixed", [
    ("vit_tiny_patch16_224", {"img_size": 64}, (64, 64)),
    ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}, None),
    ("mixer_s32_224", {"img_size": 64}, (64, 64)),
    ("resnet10t", {"in_chans": 1}, None),
])  # fmt: skip
def test_default_size_is_what_the_model_was_built_for(name, given, fixed):
    model = timm.create_model(name, num_classes=3, **given)
    assert fixed_size(model) == fixed
    taps = Taps(model)
    assert taps.size[0] == given.get("in_chans", 3)
    assert fixed is None or taps.size[1:] == fixed
    x = torch.rand(2, *taps.size)
    assert Frozen(model)(x).logits.shape == (2, 3)


def test_a_size_that_only_the_table_fixes_is_tried():
    own = timm.create_model(
        "hiera_tiny_224", img_size=32, embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), num_classes=3
    )
    assert (
        Preprocess.from_model(own, (32, 32)).size is None
    )  # built for these images, whatever its table says
    assert Preprocess.from_model(own, (48, 48)).size == fixed_size(own) == (224, 224)
    assert Preprocess.from_model(net("vit_tiny_patch16_224"), (32, 32)).size == (64, 64)


def test_preprocess():
    model = timm.create_model("resnet10t", in_chans=1)
    mean, std = normalisation(model)
    assert len(mean) == 1 and mean[0] == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    x = torch.rand(2, 1, 4, 4)
    prepared = Preprocess.from_model(model)
    with torch.inference_mode():
        prepared(x)
    grown = prepared(
        x.clone().requires_grad_()
    )  # constants made in inference mode would not be saved for backward
    (grown * grown).sum().backward()
    torch.testing.assert_close(grown, (x - mean[0]) / std[0])
    vit = net("vit_tiny_patch16_224")
    assert Preprocess.from_model(vit, (64, 64)).size is None
    assert Preprocess.from_model(vit, (32, 32))(torch.rand(1, 3, 32, 32)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="both mean and std"):
        Preprocess(mean=(0.5,))


def test_only_meta_is_used_and_the_model_is_left_alone():
    model = Own().train()
    before = copy.deepcopy(model.state_dict())
    with torch.device("meta"):
        huge = timm.create_model("vit_huge_patch14_224")
    assert Taps(huge, size=224).shapes[1].channels == 1280
    state = torch.get_rng_state()
    Taps(model, size=32)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_model_that_cannot_run_on_meta_is_traced_on_its_own_device():
    class Fixed(Own):
        def forward(self, x):
            if float(x.detach().sum()) >= 0:  # needs a value, the meta device has none
                return super().forward(x)
            return None

    model = Fixed().train()
    taps = Taps(model, size=32)
    assert {k: tuple(s) for k, s in taps.shapes.items()} == {
        1: (8, 16, 16),
        2: (12, 8, 8),
        3: (16, 4, 4),
    }
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(
        int(m.num_batches_tracked) == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )


# --- forward and replace
@every_net
@torch.no_grad()
def test_logits_do_not_change(tapped):
    name, taps = tapped
    x = images(name)
    with_taps = taps(x)
    again = taps(x, replace=dict(with_taps.feats))  # its own features change nothing
    keys = taps.keys
    taps.remove_hooks()
    plain = taps.model(x)
    assert torch.equal(with_taps.logits, plain) and torch.equal(again.logits, plain)
    assert list(with_taps.feats) == keys
    for key in keys:
        assert torch.equal(with_taps.feats[key], again.feats[key])


@every_net
@torch.no_grad()
def test_noise_at_a_stage_changes_what_comes_after_and_only_that(tapped):
    name, taps = tapped
    x = images(name)
    plain = taps(x)
    for key in taps.keys:
        noise = plain.feats[key] + torch.rand(
            plain.feats[key].shape, generator=torch.Generator().manual_seed(1)
        )
        out = taps(x, replace={key: noise})
        assert not torch.equal(out.logits, plain.logits)
        for other in taps.keys:
            assert torch.equal(out.feats[other], plain.feats[other]) == (other <= key)


@every_net
@torch.no_grad()
def test_reset_equals_a_full_pass_with_replacements(tapped):
    name, taps = tapped
    x = images(name)
    replace = {k: v for k, v in taps(images(name, seed=1)).feats.items() if k != taps.keys[-1]}
    full = taps(x, replace=replace).feats
    reset = taps.reset(x, replace, taps.keys[1:])
    assert list(reset) == taps.keys[1:]
    for key, feature in reset.items():
        torch.testing.assert_close(feature, full[key], rtol=1e-6, atol=1e-6)
        assert not torch.equal(feature, taps(x).feats[key])


def calls_of(model):
    """Counts of calls by module name."""
    counts = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, a, n=name: counts.update({n: counts.get(n, 0) + 1})
        )
        for name, module in model.named_modules()
    ]
    return counts, handles


@pytest.mark.parametrize(
    "name, first, head",
    [
        ("cifar_wrn16_1", "block1", "fc"),
        ("resnet10t", "layer1", "fc"),
        ("vit_tiny_patch16_224", "blocks.0", "head"),
        ("own", "features.0", "head"),
    ],
)
def test_a_reset_pass_skips_the_first_stage_and_the_head(name, first, head):
    model = copy.deepcopy(net(name))
    taps = Taps(model, size=size_of(name))
    x = images(name)
    a, b = taps.keys[-2:]
    replace = {a: taps(x).feats[a]}
    counts, handles = calls_of(model)
    taps.reset(x, replace, [b])
    assert counts and not any(n in (first, head, "") or n.startswith(first + ".") for n in counts)
    counts.clear()
    taps(x)
    assert counts[head] == 1 and any(n.startswith(first) for n in counts)
    for handle in handles:
        handle.remove()


def test_reset_of_a_stage_that_is_no_chain_stops_after_the_last_wanted_tap():
    class Tangled(Own):  # an operation between two stages that belongs to no module
        def forward(self, x):
            x = self.features[1](self.features[0](x) * 2 + 1)
            return self.head(self.features[2](x).mean((2, 3)))

    model = Tangled().eval()
    taps = Taps(model, ["features.0", "features.1", "features.2"], 32)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        replace = {"features.0": torch.rand_like(taps(x).feats["features.0"])}
        full = taps(x, replace=replace).feats["features.1"]
        counts, _ = calls_of(model)
        got = taps.reset(x, replace, ["features.1"])["features.1"]
    assert torch.equal(got, full)
    assert "features.2" not in counts and "head" not in counts


@pytest.mark.parametrize("name", RESIDUAL)
def test_gradient_flows_through_a_reset_stage_and_not_into_its_parameters(name):
    model = copy.deepcopy(net(name))
    teacher = Frozen(model, size=size_of(name), preprocess=Preprocess())
    x = images(name)
    out = teacher(x)
    assert not out.logits.requires_grad
    a, b = teacher.keys[:2]
    feature = out.feats[a].clone().requires_grad_()
    teacher.reset(x, {a: feature}, [b])[b].square().mean().backward()
    assert feature.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


# --- frozen
def test_teacher_stays_in_eval_without_drift_and_is_given_back():
    class Student(Own):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher  # a user's slip: train() reaches the teacher

    torch.manual_seed(0)
    model = Own()
    model.features[0].eval()  # a mixed state, to be found again
    model.head.bias.requires_grad_(False)
    state, modes = (
        copy.deepcopy(model.state_dict()),
        {n: m.training for n, m in model.named_modules()},
    )
    modules = dict(model.named_modules())
    teacher = Frozen(model, size=32)
    student = Student(model)
    taps = Taps(student, ["features.2"], 32)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, weight_decay=0.1)
    first = teacher(torch.ones(2, 3, 32, 32)).logits
    for step in range(3):
        student.train()
        assert model.training
        x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        s, t = taps(x), teacher(x)
        assert not any(m.training for m in model.modules())
        loss = (s.logits - t.logits).square().mean() + (
            s.feats["features.2"] - t.feats[3]
        ).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(teacher(torch.ones(2, 3, 32, 32)).logits, first)
    assert all(p.grad is None for p in model.parameters())
    assert int(student.features[0][1].num_batches_tracked) == 3
    assert teacher.fold_batch_norms() == 3
    assert teacher.fold_batch_norms() == 0  # nothing is left, and nothing is forgotten
    assert "features.0.1.weight" not in model.state_dict()
    teacher.to(torch.float64).to(torch.float32)
    released = teacher.release()
    assert released is model
    assert list(model.state_dict()) == list(state)
    assert all(
        torch.equal(state[k], v) and v.dtype == state[k].dtype
        for k, v in model.state_dict().items()
    )
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(modules[n] is m for n, m in model.named_modules())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"head.bias"}
    assert not any(m._forward_hooks for m in model.modules())


def test_modules_put_aside_by_fold_follow_the_teacher():
    model = Own()
    teacher = Frozen(model, size=32)
    teacher.fold_batch_norms()
    teacher.to(torch.float64)
    assert {p.dtype for p in teacher.release().parameters()} == {torch.float64}


def test_a_refused_teacher_is_left_as_it_was():
    model = Own().train()
    with pytest.raises(ValueError, match="not a module"):
        Frozen(model, ["nowhere"], 32)
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "cifar_wrn16_1",
        "cifar_resnet8",
        "cifar_vgg8",
        "cifar_mobilenetv2_half",
        "mobilenetv3_small_050",
        "torchvision_resnet18",
        "own",
    ],
)
def test_fold_computes_the_same(name):
    model = copy.deepcopy(net(name))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # trained statistics
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.7, 1.4)
            nn.init.uniform_(module.weight, 0.7, 1.3)
    teacher = Frozen(model, size=size_of(name))
    x = images(name)
    before = teacher(x)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert 0 < teacher.fold_batch_norms() <= norms
    after = teacher(x)
    scale = before.logits.abs().max()
    assert (after.logits - before.logits).abs().max() <= 1e-5 * scale
    for key in teacher.keys:
        assert (after.feats[key] - before.feats[key]).abs().max() <= 1e-5 * before.feats[
            key
        ].abs().max()
    a, b = teacher.keys[:2]
    reset = teacher.reset(x, {a: after.feats[a]}, [b])[b]
    torch.testing.assert_close(reset, after.feats[b], rtol=1e-5, atol=1e-5)
    teacher.release()
    assert torch.equal(Frozen(model, size=size_of(name))(x).logits, before.logits)


# --- traps of copies
def test_a_deep_copy_does_not_write_into_the_live_store():
    model = Own()
    taps = Taps(model, size=32)
    ema = copy.deepcopy(model)
    x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)

    class Between(nn.Module):  # the copy runs while the live model is in its forward
        def forward(self, z):
            ema(y)
            return z

    model.drop = Between()
    out = taps(x)
    loss = sum(f.square().mean() for f in out.feats.values())
    loss.backward()
    assert all(p.grad is not None for p in model.features.parameters())
    assert all(p.grad is None for p in ema.parameters())
    own = Taps(ema, size=32)
    assert set(own(x).feats) == {1, 2, 3}


def test_pickle_of_a_tapped_model():
    model = net("cifar_resnet8")
    taps = Taps(model, size=32)
    copied = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    x = images("cifar_resnet8")
    for other in (copied, torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert torch.equal(other(x), taps(x).logits)
        assert list(other.state_dict()) == list(model.state_dict())
    taps.remove_hooks()


def test_copies_and_pickles_of_taps():
    student, teacher = Taps(Own(), size=32), Frozen(copy.deepcopy(net("cifar_resnet8")), size=32)
    method = create_method("srkd", student, [teacher])
    batch = {
        "x": torch.rand(4, 3, 32, 32),
        "y": torch.zeros(4, dtype=torch.long),
        "index": torch.arange(4),
    }
    average = ModelEmaV3(method, decay=0.5)  # a deep copy
    average.module.train()
    torch.manual_seed(0)
    losses = method(batch, Clock()).losses
    torch.manual_seed(0)
    copied = average.module(batch, Clock()).losses
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in copied.items()}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad is None for p in average.module.parameters())
    assert average.module.taps.model is average.module.student is not method.student
    assert average.module.teachers == method.teachers
    again = pickle.loads(pickle.dumps(student))
    assert again.keys == student.keys and again.shapes == student.shapes
    method.release()


def test_the_student_that_is_handed_back_can_be_exported():
    model = Own().eval()
    method = create_method(
        "at", Taps(model, None, 32), [Frozen(copy.deepcopy(net("cifar_resnet8")), size=32)]
    )
    assert any(m._forward_hooks for m in model.modules())
    method.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    x = torch.rand(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert len(program.graph_signature.user_outputs) == 1


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny_patch16_224", "pit_ti_224"])
def test_compile_keeps_features(name):
    torch._dynamo.reset()
    model = copy.deepcopy(net(name))
    taps = Taps(model, size=size_of(name))
    x = images(name)
    plain = taps(x)
    taps._forward = torch.compile(taps._run_model, backend="eager", fullgraph=True)
    for _ in range(3):
        out = taps(x)
        assert torch.equal(out.logits, plain.logits)
        assert all(torch.equal(out.feats[k], plain.feats[k]) for k in taps.keys)
    sum(f.mean() for f in out.feats.values()).backward()
    assert next(model.parameters()).grad.abs().sum() > 0
    noise = [torch.rand(2, *part.shape) for part in taps.boundary_of(1).read_tensors]
    assert torch.equal(
        taps(x, replace={1: noise}).logits,
        Taps(model, size=size_of(name))(x, replace={1: noise}).logits,
    )
    torch._dynamo.reset()


def test_two_forwards_and_an_evaluation_before_one_backward():
    torch.manual_seed(0)
    model = Own()
    taps = Taps(model, size=32)
    first, second = taps(torch.rand(4, 3, 32, 32)), taps(torch.rand(4, 3, 32, 32))
    kept = {k: v.detach().clone() for k, v in first.feats.items()}
    model.eval()
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32))
        taps(torch.rand(4, 3, 32, 32))
    model.train()
    assert all(torch.equal(first.feats[k], kept[k]) for k in kept)
    assert not torch.equal(first.feats[1], second.feats[1])
    (first.feats[3].mean() + second.feats[2].mean() + first.logits.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- errors
def test_an_overwritten_tap_is_found():
    model = Own(inplace=True).eval()
    with pytest.raises(
        ValueError,
        match=r"'features.0.1' \(features.0.1\) is overwritten in place .* inplace=False",
    ):
        Taps(model, ["features.0.1"], 32)
    Taps(model, ["features.0.2"], 32)(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("keys, message", [
    (["feature.0"], r"not a module of Own; its children: features, drop, head; .* 'features.0'"),
    (["features"], r"'features' never fired: it is a list that the model iterates .* 'features.2'"),
    ([4], r"Own has 3 stages, stage 4 is none of them; .*from 1"),
    ([-4], "stage -4 is none of them"),
    ([0], "stage 0 is none of them"),
])  # fmt: skip
def test_unknown_taps(keys, message):
    with pytest.raises(ValueError, match=message):
        Taps(Own(), keys, 32)


def test_negative_stages_become_positive():
    assert Taps(Own(), (-1, -3), 32).keys == [3, 1]


def test_outputs_that_are_no_feature():
    class Odd(Own):
        def __init__(self):
            super().__init__()
            self.pair, self.twice, self.unused = Pair(), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            a, b = self.pair(self.features[0](x))
            return self.head(
                self.features[2](self.features[1](self.twice(a) + self.twice(b))).mean((2, 3))
            )

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Tanh()

        def forward(self, x):
            return self.inner(x), -x

    for key, message in {
        "pair[2]": "returns no feature .*it returns '\\[0\\]', '\\[1\\]'",
        "twice": "fired 2 times in one forward: the model uses it several times",
        "unused": "never fired: the model does not call it",
    }.items():
        with pytest.raises(ValueError, match=f"tap {re.escape(repr(key))} {message}"):
            Taps(Odd(), [key], 32)
    taps = Taps(Odd().eval(), ["pair.inner", "features.1"], 32)
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"cannot reset Odd at 'pair.inner' .*other paths lead past it"
    ):
        taps(x, replace={"pair.inner": torch.rand(2, 8, 16, 16)})
    with pytest.raises(
        ValueError, match=r"cannot replace 'features.2', no tap is there; taps: 'pair.inner'"
    ):
        taps(x, replace={"features.2": torch.rand(2, 16, 4, 4)})
    with pytest.raises(ValueError, match="nothing is replaced in front of 'features.1'"):
        taps.reset(x, {}, ["features.1"])


def test_gradient_checkpointing_is_found_or_tapped_around():
    model = timm.create_model("resnet10t", num_classes=10)
    x = torch.rand(2, 3, 64, 64)
    taps = Taps(
        model, ["layer2"], 64
    )  # the hook is on its last block: checkpointing bypasses the Sequential
    plain = model.eval() and taps(x).feats["layer2"]
    model.set_grad_checkpointing(True)
    assert torch.equal(taps(x).feats["layer2"], plain)
    taps.remove_hooks()
    assert torch.equal(Taps(model, ["layer2"], 64)(x).feats["layer2"], plain)
    assert len(Taps(model, size=64).keys) == 5


def test_reentrant_checkpointing_is_refused():
    class Saving(Own):
        reentrant = False

        def forward(self, x):
            for block in self.features:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            return self.head(x.mean((2, 3)))

    model = Saving()
    taps = Taps(model, [2], 32)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    taps(x).feats[2].square().mean().backward()
    assert all(
        p.grad.abs().sum() > 0 for block in model.features[:2] for p in block[0].parameters()
    )
    model.reentrant = True
    with pytest.raises(RuntimeError, match=r"tap 2 \(features.1.2\) was computed without autograd"):
        taps(x)


def test_wrong_sizes_and_outputs():
    with pytest.raises(
        ValueError, match=r"VisionTransformer cannot run on images of size \(3, 32, 32\)"
    ):
        Taps(net("vit_tiny_patch16_224"), size=32)
    with pytest.raises(ValueError, match="is not H"):
        Taps(Own(), size=(1, 2, 3, 4))

    class Two(Own):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"Two returns tuple, logits must be one tensor"):
        Taps(Two(), ["features.0"], 32)(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_frozen_model_keeps_its_own_precision_and_memory_format(dtype):
    model = (
        timm.create_model("cifar_resnet8", num_classes=10)
        .to(dtype)
        .to(memory_format=torch.channels_last)
    )
    teacher = Frozen(model, (), 16)
    x = torch.rand(4, 3, 16, 16)
    out = teacher(x)
    reset = teacher.reset(x, {1: out.feats[1].float()}, [2])
    assert out.logits.dtype == reset[2].dtype == dtype
    assert torch.allclose(reset[2], out.feats[2], rtol=1e-4, atol=1e-5)
    teacher.to(memory_format=torch.contiguous_format)
    teacher.release()
    assert (
        model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        and model.conv1.weight.dtype == dtype
    )


# --- boundaries of every kind
class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, 2, 1)

    def forward(self, x):
        return self.conv(x).relu()


class Branches(nn.Module):
    """Two streams to the end: a stage ends in a dict or in a tuple of two maps and a number."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Both(3, 8, "dict"), Both(8, 12, "tuple")
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        out = self.one(x, x)
        coarse, fine, scale = self.two(out["coarse"], out["fine"])
        return self.head((coarse.mean((2, 3)) + fine.mean((2, 3))) * scale)


class Both(nn.Module):
    def __init__(self, i, o, kind):
        super().__init__()
        self.coarse, self.fine, self.kind = Block(i, o), nn.Conv2d(i, o, 3, padding=1), kind

    def forward(self, coarse, fine):
        coarse, fine = self.coarse(coarse), self.fine(fine)
        return (
            {"fine": fine, "coarse": coarse, "unused": fine + 1}
            if self.kind == "dict"
            else (coarse, fine, 0.5)
        )


@torch.no_grad()
def test_stages_that_end_in_several_tensors():
    torch.manual_seed(0)
    model = Branches().eval()
    taps = Taps(model, ["one", "one[fine]", "two[0]", "two"], 32)
    assert taps.boundary_of("one").replaceable and not taps.boundary_of("one[fine]").replaceable
    assert sorted(p.name for p in taps.boundary_of("one").read_tensors) == [
        "one[coarse]",
        "one[fine]",
    ]
    assert taps.shapes["one[fine]"] == (8, 32, 32) and taps.shapes["two[0]"] == (12, 16 // 2, 8)
    x, other = torch.rand(2, 2, 3, 32, 32)
    out = taps(x)
    assert torch.equal(out.logits, model(x))
    assert torch.equal(out.feats["one[fine]"], model.one.fine(x))
    assert taps.find_reset_errors(["one", "two"]) == []
    noise = [torch.rand(2, *part.shape) for part in taps.boundary_of("one").read_tensors]
    assert torch.equal(
        taps(x, replace={"one": noise}).logits, taps(other, replace={"one": noise}).logits
    )
    by_reset = taps.reset(x, {"one": noise}, ["two"])["two"]
    assert torch.equal(by_reset, taps(other, replace={"one": noise}).feats["two"])
    with pytest.raises(
        ValueError,
        match=r"stage 'one' of Branches ends in 2 tensors, 1 were given; .* one\[coarse\] ",
    ):
        taps(x, replace={"one": noise[0]})
    with pytest.raises(
        ValueError, match=r"cannot reset Branches at 'one\[fine\]' .*other paths lead past it"
    ):
        taps(x, replace={"one[fine]": noise[0]})


@torch.no_grad()
def test_a_block_that_takes_the_two_before_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = Block(3, 8), Block(8, 8), Block(8, 8)
            self.skip, self.head = nn.Conv2d(8, 8, 1, 4), nn.Linear(8, 10)

        def forward(self, x):
            a = self.one(x)
            b = self.two(a)
            return self.head((self.three(b) + self.skip(a)).mean((2, 3)))

    torch.manual_seed(0)
    model = Two().eval()
    model.feature_info = [
        {"module": n, "num_chs": 8, "reduction": r} for n, r in (("one", 2), ("two", 4))
    ]
    taps = Taps(model, size=32)
    end = taps.boundary_of(2)
    assert [p.name for p in end.read_tensors] == ["two", "one"] and end.name == "two"
    assert end.read_tensors[1].consumers == (
        "skip",
    )  # `two` itself must still get the first output as it was
    assert taps.find_reset_errors([2]) == []
    x, other = torch.rand(2, 2, 3, 32, 32)
    noise = [torch.rand(2, *part.shape) for part in end.read_tensors]
    first, second = taps(x, replace={2: noise}), taps(other, replace={2: noise})
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.feats[2], taps(x).feats[2])  # its own, untouched


def test_a_side_path_that_hooks_cannot_replace_is_found():
    class Side(Own):
        def forward(self, x):
            x = self.features[0](x)
            return self.head(
                self.features[2](self.features[1](x)).mean((2, 3)) + self.features[0].kept.mean()
            )

    class Keeps(Block):
        def forward(self, x):
            x = super().forward(x)
            self.kept = x * 2
            return x

    model = Side().eval()
    model.features[0] = Keeps(3, 8)
    taps = Taps(model, ["features.0", "features.1"], 32)
    assert taps.boundary_of("features.0").replaceable  # everything is computed from it, and yet
    assert taps.find_reset_errors(["features.0"]) == ["the logits still depend on the image"]
    with pytest.raises(
        ValueError, match="the teacher cannot be reset at .*still depends? on the image"
    ):
        create_method(
            "srkd",
            Taps(Own(), size=32),
            [Frozen(model, size=32)],
            layers=[(1, "features.0"), (2, "features.1")],
        )


def test_models_in_wrappers():
    class Wrap(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net((x - 0.5) / 0.25)

    class Bare(nn.Module):
        """A backbone without any metadata, and a head."""

        def __init__(self):
            super().__init__()
            self.backbone, self.head = Backbone(), nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.backbone(x)["out"].mean((2, 3)))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Block(3, 8), Block(8, 12), Block(12, 16)

        def forward(self, x):
            return {"out": self.c(self.b(self.a(x)))}

    own = Taps(timm.create_model("resnet10t", num_classes=10), None, 64)
    wrapped = Taps(Wrap(own.model), size=64)
    assert [s.name for s in wrapped.stages] == ["net." + s.name for s in own.stages]
    taps = Taps(nn.Sequential(nn.Identity(), torchvision.models.resnet18(num_classes=10)), size=64)
    assert [taps.strides[k] for k in taps.keys] == [2, 4, 8, 16, 32]
    assert list(Taps(Bare(), size=32).names.values()) == ["backbone.a", "backbone.b", "backbone.c"]


def test_a_tap_keeps_the_tensor_itself_and_costs_no_call():
    model = Own()
    taps = Taps(model, size=32)
    given = {}
    for key, name in taps.names.items():
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, k=key: given.update({k: out})
        )
    counts, handles = calls_of(model)
    out = taps(torch.rand(2, 3, 32, 32))
    assert all(out.feats[key] is given[key] for key in taps.keys)
    assert set(counts.values()) == {1}
    for handle in handles:
        handle.remove()


def test_a_student_is_rehearsed_in_training_mode():
    class Pair(Own):
        def forward(self, x):
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    pair = Pair()
    teacher = Frozen(copy.deepcopy(net("cifar_resnet8")), size=64)
    with pytest.raises(ValueError, match="Pair returns tuple, logits must be one tensor"):
        create_method("kd", Taps(pair, None, 64), [teacher])
    assert pair.training and not any(m._forward_hooks for m in pair.modules())

    class Skips(Own):
        def forward(self, x):
            for block in self.features[:2] if self.training else self.features:
                x = block(x)
            return self.head(x.mean((2, 3)).repeat(1, 2)[:, :16])

    with pytest.raises(RuntimeError, match=r"tap 3 \(features.2.2\) never fired"):
        create_method("at", Taps(Skips(), None, 32), [teacher])


@torch.no_grad()
def test_behind_a_stage_nothing_in_front_of_it_is_computed():
    torch.manual_seed(0)
    model = Branches().eval()
    taps = Taps(model, ["one"], 32)
    x = torch.rand(2, 3, 32, 32)
    model.feature_info = []
    plain = Taps(model, [part.name for part in taps.boundary_of("one").read_tensors], 32)(x)
    own = list(plain.feats.values())
    nan = torch.full_like(x, float("nan"))
    counts = []
    handle = model.one.coarse.conv.register_forward_pre_hook(lambda *_: counts.append(1))
    assert torch.equal(taps.forward_from(nan, "one", own).logits, plain.logits)
    assert counts == [] and "forward" not in vars(model.one.coarse)
    assert torch.equal(taps(x, replace={"one": own}).logits, plain.logits) and counts == [1]
    handle.remove()
    with pytest.raises(ValueError, match="ends in 2 tensors, 1 were given"):
        taps.forward_from(x, "one", own[0])
    assert "forward" not in vars(model.one.coarse)


def test_a_long_tangled_chain_is_searched_once():
    """Two ways lead to each value behind a Sequential: a search that forgets doubles at each."""

    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(60)
            )
            self.head = nn.Linear(3, 10)

        def forward(self, x):
            for block in self.blocks[:-1]:
                x = block(x)
            return self.head(self.blocks[-1](x * 1.5).mean((2, 3)))

    taps = Taps(Long().eval(), ["blocks.0", "blocks.59"], 16)
    start = time.perf_counter()
    assert taps.reset(
        torch.rand(2, 3, 16, 16), {"blocks.0": torch.rand(2, 3, 16, 16)}, ["blocks.59"]
    )
    assert time.perf_counter() - start < 20


def test_stages_are_found_wherever_the_caller_stands():
    model = Own().eval()
    with torch.inference_mode():
        assert len(Taps(model, size=32).keys) == 3
    compiled = torch.compile(Own(), backend="eager")
    assert list(Taps(compiled, size=32).strides.values()) == [2, 4, 8]


def test_one_teacher_twice_is_given_back_as_it_was():
    teacher = Own().train()
    method = create_method(
        "kd", Taps(Own(), None, 32), [Frozen(teacher, size=32), Frozen(teacher, size=32)]
    )
    method.release()
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("at, size, message", [
    ("features.0", 32, r"at='features.0': give a list of taps, \['features.0'\]"),
    (2, 32, r"at=2: give a list of taps, \[2\]"),
    ((), "32", "image size '32' is not H"),
])  # fmt: skip
def test_arguments_of_another_kind(at, size, message):
    with pytest.raises(ValueError, match=message):
        Taps(Own(), at, size)


def test_old_names_of_methods_warn():
    taps, teacher = Taps(Own(), size=32), Frozen(Own(), size=32)
    for old, new in {"end": "boundary_of", "key": "resolve_key", "rest": "forward_from"}.items():
        with pytest.warns(DeprecationWarning, match=f"Taps.{old} is named {new} now"):
            assert getattr(taps, old) == getattr(taps, new)
    with pytest.warns(DeprecationWarning, match="Frozen.fold is named fold_batch_norms now"):
        assert teacher.fold() == 3
    with pytest.raises(AttributeError, match="'Taps' object has no attribute 'fold_batch_norms'"):
        taps.fold_batch_norms()
