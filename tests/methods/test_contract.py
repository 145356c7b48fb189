"""Every method by name: a contract suite, sums of losses, stage reset, several teachers, errors."""

import copy
import functools
import inspect

import pytest
import timm
import torch
from torch import nn

import kdtoolkit.models  # noqa: F401
from kdtoolkit import create_method, list_methods, losses
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.data.loading import load
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.methods.resolve import default_losses
from kdtoolkit.schedules import Linear
from kdtoolkit.types import Clock

SIZE = 16
STUDENT, TEACHER = "cifar_wrn16_1", "cifar_resnet8"
WIDE = "cifar_wrn16_2"
DOCUMENTED = {
    "none": {"ce"},
    "kd": {"ce", "kd"},
    "logits": {"ce", "logits"},
    "fitnet": {"ce", "fitnet"},
    "at": {"ce", "at"},
    "sp": {"ce", "sp"},
    "srkd": {"ce", "kd", "srkd"},
}
OF_ONE = [
    name for name in list_methods() if not isinstance(METHODS[name], StrategySpec)
]  # others: test_strategies.py
for new in set(OF_ONE) - set(DOCUMENTED):  # one that is being added: the terms that it registers
    DOCUMENTED[new] = set(METHODS[new].losses)
every_method = pytest.mark.parametrize("name", OF_ONE)


@functools.cache
def digits():
    data = load("digits")
    return data.prepare_batch(next(iter(data.train.loader(64))), epoch=0, train=False)


def some(count=16):
    return {k: v[:count] for k, v in digits().items()}


def network(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10, **kwargs)


def vit(seed=0):
    return network(
        "vit_tiny_patch16_224",
        seed,
        img_size=SIZE,
        patch_size=4,
        depth=4,
        embed_dim=24,
        num_heads=3,
    )


@functools.cache
def trained(name):
    """A teacher that knows something: 40 steps on the 64 images."""
    model = network(name, seed=7)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits()["x"]), digits()["y"]).backward()
        optimizer.step()
    return model.eval()


def make(method, student=STUDENT, teacher=WIDE, teachers=None, seed=0, **options):
    student = network(student, seed) if isinstance(student, str) else student
    if teachers is None:
        teacher = copy.deepcopy(trained(teacher)) if isinstance(teacher, str) else teacher
        teachers = [] if method == "none" else [teacher]
    return create_method(
        method,
        Taps(student, None, SIZE),
        [Frozen(t, None, SIZE, image=(SIZE, SIZE)) for t in teachers],
        image=(SIZE, SIZE),
        **options,
    )


def step(net, batch=None, clock=None):
    return net(batch or some(), clock or Clock())


def total(out):
    return sum(out.losses.values())


def gradients(net, parameters, batch=None):
    parameters = list(parameters)
    return torch.autograd.grad(total(step(net, batch)), parameters, allow_unused=True)


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


# ----------------------------------------------------------------------------------------- contract
def test_every_method_is_documented_here():
    assert set(OF_ONE) == set(DOCUMENTED)
    assert len(list_methods()) == len(set(list_methods()))


@every_method
def test_losses_are_finite_and_named_as_documented(name):
    net = make(name).train()
    out = step(net)
    assert set(out.losses) == set(default_losses(name)) == DOCUMENTED[name]
    assert out.logits["student"].shape == (16, 10)
    for loss in out.losses.values():
        assert loss.ndim == 0 and loss.isfinite() and loss > 0
    assert METHODS[name].title


@every_method
def test_gradients_reach_every_trained_parameter_and_none_of_the_teacher(name):
    net = make(name).train()
    before = [state(t.model) for t in net.teachers]
    optimizer = torch.optim.SGD(net.parameters(), 0.01, weight_decay=0.1)
    total(step(net)).backward()
    without = [
        n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without
    assert any(p.grad.abs().sum() > 0 for p in net.parameters())
    optimizer.step()
    for teacher, kept in zip(net.teachers, before, strict=True):
        assert all(p.grad is None for p in teacher.model.parameters())
        assert all(torch.equal(v, kept[k]) for k, v in teacher.model.state_dict().items())


@every_method
def test_state_dict_round_trip_without_the_teacher(name):
    net = make(name).train()
    names = [n for n, _ in net.named_parameters()]
    assert len(names) == len(set(names))
    saved = state(net)
    assert {k.split(".")[0] for k in saved} <= {"student", "losses"}
    teachers = {id(p) for t in net.teachers for p in t.model.parameters()}
    assert not teachers & {id(p) for p in net.parameters()}
    student = {k.removeprefix("student.") for k in saved if k.startswith("student.")}
    assert student == set(network(STUDENT).state_dict())
    other = make(name, seed=1).train()
    first = step(net).losses
    other.load_state_dict(saved)
    assert {k: v.item() for k, v in step(other).losses.items()} == {
        k: v.item() for k, v in first.items()
    }


@every_method
def test_thirty_steps_overfit_64_digits(name):
    net = make(name, teacher=TEACHER).train()  # stages end in a ReLU, as FitNet's regressor does
    rate = {"fitnet": 0.5}.get(
        name, 1e-2
    )  # its regressor starts at unit scale, this teacher's features are near 8
    groups = [
        {"params": net.student.parameters()},
        {"params": net.losses.parameters(), "lr": rate},
    ]
    optimizer = torch.optim.Adam(groups, 1e-2)
    course = []
    for _ in range(30):
        loss = total(step(net, digits()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < course[0] / 2, course


@every_method
def test_plan_names_every_loss_and_counts_every_parameter(name):
    net = make(name)
    plan = net.plan()
    assert {row["loss"] for row in plan["losses"]} == DOCUMENTED[name]
    trained_parameters = plan["parameters"]["student"] + plan["parameters"]["adapters"]
    assert trained_parameters == sum(p.numel() for p in net.parameters())


@every_method
def test_release_takes_everything_off(name):
    net = make(name)
    models = [net.student, *(t.model for t in net.teachers)]
    net.release()
    assert not any(m._forward_hooks for model in models for m in model.modules())
    assert all(p.requires_grad for model in models for p in model.parameters())


@every_method
def test_every_loss_says_what_it_is_and_where_it_differs(name):
    for loss in DOCUMENTED[name]:
        description = inspect.getmodule(LOSSES[loss]).__doc__
        assert "\n\nLoss: " in description and "\n\nDiffers: " in description


# --------------------------------------------------------------------------------- weights and sums
def test_a_weight_may_be_a_schedule():
    net = make("kd", losses={"ce": 1.0, "kd": Linear(0.0, 2.0)}).eval()
    at = {share: step(net, clock=Clock(step=share, total_steps=4)).losses for share in (0, 1, 4)}
    assert at[0]["kd"].item() == 0.0 < at[1]["kd"].item()
    torch.testing.assert_close(at[4]["kd"], 4 * at[1]["kd"])
    assert at[0]["ce"] == at[4]["ce"]


def test_kd_switched_off_is_plain_training_to_the_last_digit():
    plain, off = make("none"), make("kd", losses={"ce": 1.0, "kd": 0.0})
    calls = []
    off.teachers[0].model.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizers = [
        torch.optim.SGD(n.parameters(), 0.1, momentum=0.9, weight_decay=5e-4) for n in (plain, off)
    ]
    for number in range(5):
        batch = {k: v[number * 8 : number * 8 + 8] for k, v in digits().items()}
        losses = []
        for net, optimizer in zip((plain, off), optimizers, strict=True):
            loss = total(step(net.train(), batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    one, two = plain.student.state_dict(), off.student.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not calls
    step(make("kd", losses={"ce": 1.0, "kd": 0.5}, teachers=[off.teachers[0].release()]))
    assert calls  # the count counts


def test_a_switched_off_loss_still_touches_its_parameters():
    net = make("fitnet", losses={"ce": 1.0, "fitnet": 0.0}).train()
    total(step(net)).backward()
    adapters = list(net.losses["fitnet"].parameters())
    assert adapters and all(p.grad is not None and not p.grad.any() for p in adapters)


def test_sum_of_methods():
    losses = {"ce": 1, "kd": 1, "at": 1000, "sp": 3000, "srkd": 0.1}
    assert set(default_losses(["at", "srkd"])) == {"ce", "at", "kd", "srkd"}
    net = make(["at", "srkd"], losses=losses).eval()
    out = step(net)
    assert set(out.losses) == set(losses)
    for name, weight in losses.items():
        alone = make("kd", losses={name: weight}).eval()
        alone.load_state_dict(
            {k: v for k, v in net.state_dict().items() if k in alone.state_dict()}
        )
        torch.testing.assert_close(step(alone).losses[name], out.losses[name])
    assert total(out).item() == pytest.approx(sum(v.item() for v in out.losses.values()))


def test_an_objective_that_is_already_built():
    student, teacher = (
        Taps(network(STUDENT), None, SIZE),
        Frozen(copy.deepcopy(trained(WIDE)), None, SIZE),
    )
    pairs = [(-1, -1)]
    part = losses.AT(student, teacher, pairs, p=4.0)
    assert part.pairs == [(3, 3)]
    net = create_method([part], student, [teacher], image=(SIZE, SIZE))
    assert set(step(net).losses) == {"ce", "at"}
    with pytest.raises(ValueError, match="named alike: at, at"):
        create_method([part, losses.AT(student, teacher, pairs)], student, [teacher])
    with pytest.raises(ValueError, match="the losses at need a teacher, none was given"):
        create_method([part], student, [])


def test_several_teachers_share_the_weight():
    a, b = copy.deepcopy(trained(WIDE)), copy.deepcopy(trained(TEACHER))
    net = make("kd", teachers=[a, b]).eval()
    out = step(net)
    assert set(out.losses) == {"ce", "kd/0", "kd/1"}
    for number, teacher in enumerate((a, b)):
        alone = step(make("kd", teachers=[copy.deepcopy(teacher)]).eval()).losses["kd"]
        torch.testing.assert_close(out.losses[f"kd/{number}"], alone / 2)
    net = make(["at", "srkd"], teachers=[a, b]).train()
    total(step(net)).backward()
    assert all(p.grad is not None for p in net.parameters())
    scheduled = make("kd", teachers=[a, b], losses={"kd": Linear(0.0, 1.0)}).eval()
    late = step(scheduled, clock=Clock(step=1, total_steps=1)).losses
    torch.testing.assert_close(late["kd/1"], out.losses["kd/1"] / 0.9)


@pytest.mark.parametrize("student, teacher", [("cnn", "vit"), ("vit", "cnn")])
@every_method
def test_convolutional_and_transformer_pairs(name, student, teacher):
    if name == "none":
        nets = {"cnn": lambda: network(STUDENT), "vit": vit}
        assert step(make("none", student=nets[student]())).losses["ce"].isfinite()
        return
    models = {"cnn": network(STUDENT, 1), "vit": vit(1)}
    net = make(name, student=models[student], teacher=models[teacher]).train()
    out = step(net)
    assert all(v.isfinite() for v in out.losses.values())
    total(out).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in net.teachers[0].model.parameters())


def test_mixed_precision_gives_float_losses():
    net = make(
        ["at", "srkd"], losses={"ce": 1, "kd": 1, "at": 1000, "sp": 3000, "srkd": 0.1}
    ).train()
    whole = {k: v.item() for k, v in step(net).losses.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step(net)
    assert {v.dtype for v in out.losses.values()} == {torch.float32}
    for name, value in out.losses.items():
        assert value.item() == pytest.approx(whole[name], rel=0.2), name
    total(out).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# -------------------------------------------------------------------------------------- stage reset
def slow_srkd(net, batch, numbers):
    """The paper's sum, with the teacher's stages called by hand (CifarNet of three blocks)."""
    part, student, teacher = net.losses["srkd"], net.student, net.teachers[0].model

    def features(model, x):
        x = model.conv1(x)
        found = [x]
        for block in (model.block1, model.block2, model.block3):
            x = block(x)
            found.append(x)
        return found

    s = features(student, net.preprocess(batch["x"]))
    plain = features(teacher, net.teachers[0].preprocess(batch["x"]))
    blocks = [teacher.block1, teacher.block2, teacher.block3]
    loss = 0.0
    for i in (1, 2, 3):
        target = plain[i]
        if i in numbers:
            target = blocks[i - 1](part.inputs[str(i)][0](s[i - 1]))
        if part.target_adapters:
            target = part.target_adapters[i - 1](target)
        loss = loss + ((part.adapters[i - 1](s[i]) - target) ** 2).mean()
    return loss


@pytest.mark.parametrize(
    "reset, numbers",
    [
        ("all", (2, 3)),
        ((), ()),
        ((3,), (3,)),
        ((3, 2), (2, 3)),
        ([1], (1,)),
        ((1, 2, 3), (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("detach", [True, False])
def test_srkd_is_the_papers_sum(reset, numbers, detach):
    net = make("srkd", losses={"srkd": 1.0}, reset=reset, detach=detach).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            step(net).losses["srkd"], slow_srkd(net, some(), numbers), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("adapters", ["auto", "always"])
@pytest.mark.parametrize("sides", ["student", "both"])
@pytest.mark.parametrize("teacher", [STUDENT, WIDE])
def test_adapters_of_srkd(adapters, sides, teacher):
    net = make(
        "srkd", STUDENT, teacher, losses={"srkd": 1.0}, adapters=adapters, sides=sides
    ).eval()
    part = net.losses["srkd"]
    equal = [adapter.src.channels == adapter.dst.channels for adapter in part.adapters]
    assert equal == [teacher == STUDENT] * 3
    learned = [any(True for _ in adapter.parameters()) for adapter in part.adapters]
    assert learned == [adapters == "always" or not same for same in equal]
    assert len(part.target_adapters) == (3 if sides == "both" else 0)
    with torch.no_grad():  # some start as identities, which would show nothing
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    loss = step(net).losses["srkd"]
    torch.testing.assert_close(loss, slow_srkd(net, some(), (2, 3)), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad.any() for p in part.adapters.parameters())
    # through the teacher's adapter, and not into the teacher
    assert all(p.grad.any() for p in part.target_adapters.parameters())
    assert all(p.grad is None for p in net.teachers[0].model.parameters())


def test_the_first_stage_is_reset_from_a_stem_that_is_named():
    net = make("srkd", losses={"srkd": 1.0}, reset=(1,), stem=("conv1", "conv1")).eval()
    with torch.no_grad():
        found = step(net).losses["srkd"]
        torch.testing.assert_close(found, slow_srkd(net, some(), (1,)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_through_the_teacher_reaches_earlier_stages_only_without_detach(detach):
    net = make("srkd", losses={"srkd": 1.0}, reset=(3,), detach=detach).eval()
    part, x = net.losses["srkd"], some()["x"]
    out = net.taps(net.preprocess(x))
    leaves = {k: f.detach().requires_grad_() for k, f in out.feats.items()}
    part(out._replace(feats=leaves), net.teachers[0](x), some()).backward()
    direct = {k: f.detach().requires_grad_() for k, f in out.feats.items()}
    adapted = [a(f) for a, f in zip(part.adapters, direct.values(), strict=True)]
    kept = net.teachers[0].reset(x, {2: part.inputs["3"][0](direct[2].detach())}, [3])[3].detach()
    plain = net.teachers[0](x).feats
    targets = [plain[1], plain[2], kept]
    sum(nn.functional.mse_loss(a, t) for a, t in zip(adapted, targets, strict=True)).backward()
    torch.testing.assert_close(leaves[1].grad, direct[1].grad)
    torch.testing.assert_close(leaves[3].grad, direct[3].grad)
    through = (leaves[2].grad - direct[2].grad).abs().max()
    assert through == 0 if detach else through > 1e-3 * direct[2].grad.abs().max()


def test_wrn_40_1_learns_from_wrn_40_2():
    net = make(
        "srkd", student="cifar_wrn40_1", teacher=network("cifar_wrn40_2", 3), losses={"srkd": 1.0}
    ).train()
    part = net.losses["srkd"]
    inputs = list(part.inputs.parameters())
    assert [tuple(p.shape[:2]) for p in inputs] == [(32, 16), (64, 32)]
    assert [tuple(p.shape[:2]) for p in part.adapters.parameters()] == [
        (32, 16),
        (64, 32),
        (128, 64),
    ]
    total(step(net, some(8))).backward()
    assert all(p.grad.abs().sum() > 0 for p in part.parameters())  # A_i through the frozen stage
    assert all(p.grad is None for p in net.teachers[0].model.parameters())


def test_equal_shapes_need_no_adapters():
    teacher = network(STUDENT, 5)
    net = make("srkd", teacher=teacher)
    assert not list(net.losses.parameters())
    same = make("srkd", teacher=copy.deepcopy(net.student), losses={"srkd": 1.0}).eval()
    assert step(same).losses["srkd"].item() < 1e-10  # a copy agrees with itself at every stage


def test_srkd_shares_the_first_stage_with_the_plain_pass():
    net = make("srkd").train()
    teacher, counts = net.teachers[0].model, {}
    for name in ("conv1", "block1", "block2", "block3", "fc"):
        module = teacher.get_submodule(name)
        module = module[-1] if isinstance(module, nn.Sequential) else module
        module.register_forward_pre_hook(
            lambda *_, n=name: counts.update({n: counts.get(n, 0) + 1})
        )
    step(net)
    assert counts == {"conv1": 1, "block1": 1, "block2": 2, "block3": 2, "fc": 1}


def test_srkd_by_module_names():
    layers = [("block1", "layer1"), ("block3", "layer3")]
    net = make("srkd", teacher=network(TEACHER, 2), layers=layers).train()
    assert net.losses["srkd"].pairs == layers
    total(step(net)).backward()
    assert all(p.grad is not None for p in net.parameters())


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "method, given, message",
    [
        ("skrd", {}, r"unknown method 'skrd'; did you mean 'srkd'.*Known: at, bake"),
        ("xyzzy", {}, r"unknown method 'xyzzy'\. Known: at, bake"),
        ([], {}, r"method=\[\] names nothing; known: at"),
        (
            "kd",
            {"losses": {"ce": 1, "fitnett": 1}},
            r"unknown loss 'fitnett'; did you mean 'fitnet'",
        ),
        (
            "kd",
            {"losses": {"ce": -1.0}},
            "weight of loss 'ce' is -1.0: a number >= 0, or a schedule",
        ),
        ("kd", {"losses": {"ce": "1"}}, "weight of loss 'ce' is '1'"),
        ("kd", {"losses": {"ce": 0, "kd": 0.0}}, "every weight is zero"),
        (
            "kd",
            {"temprature": 2},
            "unknown option 'temprature' for the losses ce, kd; .*temperature",
        ),
        ("kd", {"temperature": 0}, "temperature is 0; allowed: a finite number above 0"),
        ("kd", {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ("kd", {"reset": ()}, "unknown option 'reset' for the losses ce, kd"),
        ("kd", {"teachers": []}, "the loss 'kd' needs a teacher"),
        ("at", {"p": 0.5}, "p is 0.5; allowed: a finite number from 1"),
        (
            "at",
            {"layers": [("block1", "blok1")]},
            "'blok1' is not a module of WideResNet.*did you mean 'block1'",
        ),
        ("at", {"layers": "first"}, "layers='first': 'auto' or a list"),
        ("at", {"layers": []}, "AT compares features: give pairs of taps"),
        ("at", {"layers": [(1, 7)]}, "has 3 stages, stage 7 is none of them"),
        ("sp", {"sp_stages": "first"}, "sp_stages is 'first'; allowed: 'last', 'all'"),
        (
            "fitnet",
            {"hint": 4},
            r"hint is 4; allowed: a pair of stages from 1 to 3 \(-1 is the last\)",
        ),
        ("fitnet", {"hint": "last"}, "hint is 'last'"),
        (
            "srkd",
            {"reset": (4,)},
            r"reset is \(4,\); allowed: 'all' or a list of stage pairs from 1 to 3",
        ),
        ("srkd", {"reset": 3}, "reset is 3; allowed: 'all' or a list"),
        ("srkd", {"reset": "last"}, "reset is 'last'"),
        ("srkd", {"layers": [(1, 1)]}, "at least two pairs of stages"),
        ("srkd", {"layers": [(3, 3), (1, 1)]}, "from shallow to deep, each tap once"),
        ("srkd", {"layers": [(1, 1), (2, 1)]}, "from shallow to deep, each tap once"),
        (
            "srkd",
            {"layers": [(1, "block1.0.conv1"), (2, 2)]},
            "cannot reset .* at 'block1.0.conv1' .*other paths",
        ),
    ],
)
def test_what_is_refused(method, given, message):
    with pytest.raises(ValueError, match=message):
        make(method, **given)


def test_a_name_is_registered_once():
    class Again(DistillationLoss):
        pass

    with pytest.raises(ValueError, match="loss 'kd' is registered twice"):
        LOSSES.add("kd")(Again)


def test_layers_without_a_loss_that_reads_features_are_refused():
    student, teacher = (
        Taps(network("cifar_resnet8"), None, 16),
        Frozen(network("cifar_resnet14"), None, 16),
    )
    with pytest.raises(
        ValueError, match="layers=.* has no effect: the losses ce, kd read no features"
    ):
        create_method("kd", student, [teacher], layers=[(1, 1)])
