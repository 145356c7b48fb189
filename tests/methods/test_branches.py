"""Branches on a shared trunk: each is a complete network, alone they are alone, joined they agree
with the papers."""

import copy
import functools

import paper_totals
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from kdtoolkit import functional
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branch_join import BranchOutputs
from kdtoolkit.methods.branches import Branches
from kdtoolkit.methods.cl import OthersMean
from kdtoolkit.methods.factory import create_method
from kdtoolkit.methods.okddip import PeerAttention
from kdtoolkit.methods.one import GatedEnsemble
from kdtoolkit.methods.pcl import EnsembleClassifier
from kdtoolkit.models.embedding import EmbeddingHook, embedding_size
from kdtoolkit.models.network_cut import boundary_taps, find_last_cut
from kdtoolkit.models.tail import Tail
from kdtoolkit.schedules import Linear, SigmoidRampUp, with_rampup
from kdtoolkit.types import Clock

FAMILIES = {
    "cifar_resnet8": ("cifar_resnet8", {}, 32),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 48, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2},
        48,
    ),
    "convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}, 64),
}
LATE = Clock(step=900, epoch=90, steps_per_epoch=10, total_steps=1000)  # ramps are over


def nets(count, family="cifar_resnet8", **more):
    name, options, _ = FAMILIES[family]
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(timm.create_model(name, num_classes=10, **options, **more))
    return made


@functools.cache
def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:64, None] / 16, torch.tensor(
        data.target
    )[:64]


def batch_of(family="cifar_resnet8", count=8, views=0):
    """Digits; the views of one differ in brightness."""
    size, (x, y) = FAMILIES[family][2], digits()
    x = F.interpolate(x[:count], size, mode="bilinear").expand(-1, 3, -1, -1)
    x = torch.stack([x * (1 - 0.2 * k) for k in range(max(views, 1))], dim=1)
    return {"x": x[:, 0], "y": y[:count], **({"views": x} if views else {})}


def strategy(name, family="cifar_resnet8", **options):
    others = nets(options.get("branches", 4), family)
    size = FAMILIES[family][2]
    taps = Taps(others[0], None, size)
    return create_method(
        name, taps, image=(size, size), make_network=lambda k, spec=None: others[k], **options
    )


# -------------------------------------------------------------------------------- complete networks
@pytest.mark.parametrize("family", ["cifar_resnet8", "vit", "convnext"])
def test_a_branch_is_a_complete_network(family):
    method = strategy("one", family, branches=3)
    batch = batch_of(family)
    method(batch, LATE)  # BatchNorm statistics move
    method.eval()
    with torch.no_grad():
        predicted = method.predict(batch["x"])
        assert list(predicted) == ["student", "branch1", "branch2", "ensemble"]
        for k, (name, net) in enumerate(method.networks().items()):
            assert torch.equal(predicted[name], method.logits(name, batch["x"]))
            plain = nets(1, family)[0].eval()
            plain.load_state_dict(net.state_dict())
            assert torch.equal(plain(method.preprocess(batch["x"])), predicted[name])
            assert torch.equal(copy.deepcopy(net)(method.preprocess(batch["x"])), predicted[name])
            assert not k or not torch.equal(predicted[name], predicted["student"])
    method.release()
    assert not any(
        m._forward_hooks or m._forward_pre_hooks
        for net in method.networks().values()
        for m in net.modules()
    )


@pytest.mark.parametrize("family", ["cifar_resnet8", "vit", "convnext"])
def test_parameters_are_there_once_and_all_learn(family):
    method = strategy("one", family, branches=3)
    trunk = set(dict(method.student.named_parameters()))
    first, *others = method.networks().values()
    shared = [
        n for n in trunk if all(net.get_parameter(n) is first.get_parameter(n) for net in others)
    ]
    behind = [
        n
        for n in trunk
        if not any(net.get_parameter(n) is first.get_parameter(n) for net in others)
    ]
    assert shared and behind and sorted(shared + behind) == sorted(trunk)
    counts = method.plan()["parameters"]
    assert counts["trunk"] == sum(first.get_parameter(n).numel() for n in shared)
    assert sum(p.numel() for p in method.parameters()) == sum(counts.values())
    assert len({t.data_ptr() for t in method.state_dict().values() if t.numel()}) == len(
        [t for t in method.state_dict().values() if t.numel()]
    )
    sum(method(batch_of(family), LATE).losses.values()).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in method.named_parameters()
        if n[:4] != "join"
    )


def test_a_tail_runs_nothing_in_front(monkeypatch):
    net, calls = nets(1)[0], []
    tail, x, convolve = Tail(net, 2, 32), batch_of()["x"], nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda conv, *args: calls.append(conv) or convolve(conv, *args)
    )
    out = Taps(net.eval(), [2], 32)(x)
    calls.clear()
    assert torch.equal(tail.eval()(x, out.feats[2]), out.logits)
    ran = [conv for conv in calls if not conv.weight.is_meta]
    assert len(ran) == 3 and set(ran) <= set(net.layer3.modules())
    tail.train()
    assert (
        net.training and net.layer3.training and not net.layer1.training
    )  # the mixed ones and its own
    net.eval()
    tail.eval().parts.training = True  # a mode that was set without train(), as an EMA does
    tail(x, out.feats[2])
    assert net.training and not net.layer3.training
    assert tail.network is net and set(tail.parts.state_dict()) < set(net.state_dict())


def test_a_boundary_of_several_tensors():
    """NASNet's cells take the two before them."""
    with torch.device("meta"):
        net = timm.create_model("nasnetalarge", num_classes=10)
    taps = Taps(net, None, 96)
    assert find_last_cut(taps) == 4 and boundary_taps(taps, 4) == [
        p.name for p in taps.boundary_of(4).read_tensors
    ]
    assert len(boundary_taps(taps, 4)) == 2 and boundary_taps(taps, -5) == [1]


def test_trunk_statistics_move_once_a_forward():
    """ONE runs the trunk once; PCL once a view."""
    alone = nets(1)[0]
    for name, runs in (("one", 1), ("pcl", 3)):
        method = strategy(name, branches=3)
        method(batch_of(views=3), LATE)
        assert method.student.bn1.num_batches_tracked == runs
        last = [k for k in method.state_dict() if k.endswith("layer3.0.bn1.num_batches_tracked")]
        assert len(last) == 3 and all(method.state_dict()[k] == 1 for k in last)
    alone(method.preprocess(batch_of()["x"]))
    method = strategy("one", branches=3)
    method(batch_of(), LATE)
    assert torch.equal(method.student.bn1.running_mean, alone.bn1.running_mean)


@pytest.mark.parametrize("name", ["one", "pcl", "okddip", "cl"])
def test_copies_and_states(name):
    method, batch = strategy(name), batch_of(views=4)
    if name == "pcl":
        method.num_views, batch = 3, batch_of(views=3)
    twin = copy.deepcopy(method)
    own = {id(p) for p in method.parameters()}
    assert not any(id(p) in own for p in twin.parameters())
    for a, b in zip(
        method(batch, LATE).losses.values(), twin(batch, LATE).losses.values(), strict=True
    ):
        assert torch.equal(a, b)
    before = copy.deepcopy(twin.state_dict())
    for p in method.parameters():
        nn.init.normal_(p, std=0.05)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    twin.load_state_dict(method.state_dict())
    assert set(before) == set(method.state_dict())
    with torch.no_grad():
        mine, its = (m.eval().predict(batch["x"]) for m in (method, twin))
    assert all(torch.equal(mine[k], its[k]) for k in mine)
    method.train(), twin.train()
    one, two = method.train_logits(batch), twin.train_logits(batch)
    assert list(one) == list(method.networks()) and all(torch.equal(one[k], two[k]) for k in one)


def test_moves_and_memory_formats():
    """What lies in mixed modules themselves moves too: a ViT's tables, buffers of the network
    itself."""
    method = strategy("one", "vit", branches=2)
    net = method.networks()["branch1"]
    net.register_buffer("scale", torch.ones(1))
    tail = Tail(net, method.cut, 48)
    tail.double()
    assert net.scale.dtype == torch.float64 and net.blocks[2].norm1.weight.dtype == torch.float64
    assert net.blocks[0].norm1.weight.dtype == torch.float32
    assert tail.state_dict()["parts.scale"].dtype == torch.float64
    method = strategy("one", branches=2).to(memory_format=torch.channels_last)
    conv = method.networks()["branch1"].layer3[0].conv2
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    sum(method(batch_of(), LATE).losses.values()).backward()
    assert (
        conv.weight is method.tails["branch1"].parts.layer3[0].conv2.weight
        and conv.weight.grad is not None
    )


# ---------------------------------------------------------------------------------- alone, together
@pytest.mark.parametrize("family", ["cifar_resnet8", "vit"])
def test_branches_that_nothing_joins_are_alone(family):
    """Loss and tail's gradients of each as in a run of its own; the trunk gets the sum."""
    weights = {"ce/ensemble": 0.0, "ensemble": 0.0}
    method = strategy("one", family, branches=3, losses={"ce": 1.0, **weights}).double()
    singles = [copy.deepcopy(net) for net in method.networks().values()]
    batch = batch_of(family)
    batch["x"] = batch["x"].double()
    step = method(batch, LATE)
    sum(step.losses.values()).backward()
    total = dict.fromkeys(dict(method.student.named_parameters()), 0.0)
    for name, single, net in zip(step.logits, singles, method.networks().values(), strict=True):
        loss = functional.ce(single(method.preprocess(batch["x"])), batch["y"])
        loss.backward()
        assert torch.equal(loss, step.losses["ce" if name == "student" else f"ce/{name}"])
        for n, p in single.named_parameters():
            total[n] = total[n] + p.grad
            if net.get_parameter(n) is not method.student.get_parameter(n) or (
                name == "student" and n[:2] == "fc"
            ):
                torch.testing.assert_close(net.get_parameter(n).grad, p.grad, rtol=1e-9, atol=1e-12)
    other = method.networks()["branch1"]
    for n, p in method.student.named_parameters():
        if other.get_parameter(n) is p:
            torch.testing.assert_close(p.grad, total[n], rtol=1e-9, atol=1e-12)
    assert all(step.losses[term] == 0 and step.losses[term].requires_grad for term in weights)
    assert all(p.grad is not None and not p.grad.any() for p in method.join.parameters())


@pytest.mark.parametrize("views", [False, True])
def test_share_gradient_divides_what_enters_the_trunk(views):
    found = []
    for share in (False, True):
        method = Branches(nets(3), join=OthersMean(), views=views, share_gradient=share).double()
        batch = {
            k: v.double() if v.is_floating_point() else v for k, v in batch_of(views=3).items()
        }
        sum(method(batch, LATE).losses.values()).backward()
        found.append({n: p.grad.clone() for n, p in method.named_parameters()})
    trunk = {
        n for n in found[0] if n.startswith("student.") and "layer3" not in n and "fc" not in n
    }
    assert any("conv1" in n for n in trunk)
    for n, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][n] * (3 if n in trunk else 1), gradient, rtol=1e-9, atol=1e-12
        )


def test_views_are_each_branch_its_own():
    method, batch = strategy("pcl"), batch_of(views=3)
    assert method.num_views == 3
    method.eval()
    step = method(batch, LATE)
    for k, (name, z) in enumerate(step.logits.items()):
        assert torch.equal(z, method.logits(name, batch["views"][:, k]))


# --------------------------------------------------------------------------------------- the papers
@pytest.mark.parametrize("weight", [0.0067, 1.0])
@pytest.mark.parametrize("name", ["one", "pcl", "okddip", "cl"])
def test_the_sum_is_the_papers(name, weight):
    losses = {
        "one": {"ce": 1.0, "ce/ensemble": 1.0, "ensemble": weight},
        "pcl": {"ce": 1.0, "ce/ensemble": 1.0, "ensemble": weight, "ema": weight},
        "okddip": {"ce": 1.0, "peers": weight, "leader": weight},
        "cl": {"ce": weight, "cl": 1 - weight},
    }[name]
    method = strategy(name, losses=losses)
    batch = batch_of(views=len(method.networks()))
    y = batch["y"]
    step = method(batch, LATE)
    total = sum(step.losses.values())
    team = (
        copy.deepcopy(method)._run_branches(batch) if name == "pcl" else method._run_branches(batch)
    )
    z = list(step.logits.values())
    if name == "one":
        want = paper_totals.one(z, method.join.ensemble(team), y, weight=weight)
    elif name == "pcl":
        ensemble = method.join.ensemble(team)
        mean = [torch.randn_like(t) for t in z]
        total = total + weight * functional.kd_other_teachers(z, mean).sum()  # EMATeacher's part
        want = paper_totals.pcl(z, ensemble, mean, y, weight=weight)
    elif name == "okddip":
        attention = method.join.attention(team.embeddings[1:])
        want = paper_totals.okddip([*z[1:], z[0]], attention, y, weight=weight)
    else:
        want = paper_totals.cl_paper(z, y, beta=weight)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
    terms = {"ce", *(f"ce/{n}" for n in method.networks() if n != "student"), *losses} - {"ema"}
    assert set(step.losses) == terms == {row["loss"] for row in method.plan()["losses"]}


def test_the_gate_learns_from_its_cross_entropy_alone():
    method = strategy("one", branches=3)
    step = method(batch_of(), LATE)
    step.losses["ensemble"].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in method.join.parameters())
    step.losses["ce/ensemble"].backward()
    assert any(p.grad.any() for p in method.join.parameters())


@pytest.mark.parametrize("name", ["one", "pcl", "okddip", "cl"])
def test_thirty_steps_overfit(name):
    torch.manual_seed(0)
    method = strategy(name, branches=3)
    batch = batch_of(count=16, views=3)
    clock = Clock(total_steps=30)
    method(batch, clock)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for clock.step in range(30):
        step = method(batch, clock)
        optimizer.zero_grad()
        sum(step.losses.values()).backward()
        assert all(p.grad is not None for p in method.parameters())
        optimizer.step()
    with torch.no_grad():
        hits = {
            n: (z.argmax(1) == batch["y"]).float().mean().item()
            for n, z in method.train_logits(batch).items()
        }
    assert min(hits.values()) >= 0.9, hits


def test_products_and_callbacks():
    assert strategy("one").export_candidates()[0] == ["student", "branch1", "branch2"]
    assert (
        strategy("okddip").export_candidates()[0] == ["student"]
        and len(strategy("okddip").networks()) == 4
    )
    teacher, _ = strategy("pcl").callbacks
    assert (teacher.decay, teacher.learn_from, teacher.weight) == (
        None,
        "others",
        SigmoidRampUp(1.0),
    )
    assert strategy("pcl", losses={"ce": 1.0, "ensemble": 1.0}).callbacks == ()


def test_ramps():
    ramp = SigmoidRampUp(0.5)
    assert with_rampup({"a": ramp, "b": 2.0}, ["a", "b"], None) == {"a": ramp, "b": 2.0}
    made = with_rampup({"ce": 1.0, "a": ramp, "b": 2.0, "c": 0.0}, ["a", "b", "c"], 10)
    assert made == {"ce": 1.0, "a": SigmoidRampUp(0.5, 10), "b": SigmoidRampUp(2.0, 10), "c": 0.0}
    assert strategy("one", rampup_epochs=7).weights["ensemble"] == SigmoidRampUp(1.0, 7)


# --------------------------------------------------------------------------------------- embeddings
class ConvolutionalHead(nn.Module):
    """A classifier that is a 1x1 convolution on the map."""

    def __init__(self):
        super().__init__()
        self.stage1, self.stage2, self.head = (
            nn.Conv2d(3, 4, 3, 2),
            nn.Conv2d(4, 6, 3, 2),
            nn.Conv2d(6, 10, 1),
        )

    def forward(self, x):
        return self.head(self.stage2(self.stage1(x).relu()).relu()).mean((2, 3))

    def get_classifier(self):
        return self.head


def test_embeddings_are_the_classifiers_input():
    net = nets(1)[0].eval()
    taps, x = Taps(net, None, 32), batch_of()["x"]
    embedding = EmbeddingHook.from_taps(taps)
    logits, h = embedding.capture(net, x)
    assert h.shape == (8, embedding_size(taps)) and torch.equal(net.fc(h), logits)
    embedding.remove()
    assert not net.fc._forward_pre_hooks
    convolutional = ConvolutionalHead()
    assert embedding_size(Taps(convolutional, None, 32)) == 6
    two = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=16,
        depth=2,
        embed_dim=8,
        num_heads=2,
    )
    assert embedding_size(Taps(two, None, 32)) == 16  # of its two classifiers


def test_an_embedding_of_a_copy_is_the_copys():
    holder = nn.Module()
    holder.net = nets(1)[0].eval()
    holder.embedding = EmbeddingHook.from_taps(Taps(holder.net, None, 32))
    twin, x = copy.deepcopy(holder), batch_of()["x"]
    nn.init.constant_(twin.net.conv1.weight, 0.1)
    _, mine = holder.embedding.capture(holder.net, x)
    _, its = twin.embedding.capture(twin.net, x)
    assert not torch.equal(mine, its)
    with pytest.raises(RuntimeError, match="the classifier \\(Linear\\) was not called"):
        twin.embedding.capture(holder.net, x)


# ----------------------------------------------------------------------------------------- refusals
def own(**options):
    return Branches(nets(2), **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Branches(nets(1)), "Branches of 1 networks: give two or more of one architecture"),
        (lambda: Branches(nets(1) * 2), "networks 0 and 1 .* equal weights behind the cut"),
        (
            lambda: Branches([*nets(2), nets(2)[1]]),
            "networks 1 and 2 .* would stay equal: re-initialise them",
        ),
        (
            lambda: Branches([*nets(1), timm.create_model("cifar_resnet14")]),
            "network 1 of Branches .* other parameters",
        ),
        (
            lambda: Branches([*nets(1), timm.create_model("cifar_resnet8", num_classes=5)]),
            "use Peers",
        ),
        (lambda: own(cut="layer9"), "tap 'layer9' is not a module of"),
        (lambda: own(cut="layer2.0.conv1"), "cannot reset .* at 'layer2.0.conv1'"),
        (lambda: own(cut=9), "3 stages, stage 9 is none of them|stage 9 is none"),
        (lambda: own(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: own(weights={"cee": 1}), "unknown loss 'cee'; did you mean 'ce'"),
        (
            lambda: own(
                join=GatedEnsemble(Taps(nets(1)[0], None, 32).boundary_of(2).shape, 2), views=True
            ),
            "GatedEnsemble reads the one feature map",
        ),
        (lambda: own().compile(), "compile=True: branches are run from the feature"),
        (lambda: strategy("one", branches=1), "branches is 1; allowed: a whole number from 2"),
        (lambda: strategy("okddip", branches=2), "a leader and two peers"),
        (
            lambda: strategy("one", temperature=0),
            "temperature is 0; allowed: a finite number above 0",
        ),
        (lambda: strategy("cl", losses={"c": 1.0}), "unknown loss 'c'"),
        (
            lambda: strategy("one", rampup_epochs=5, losses={"ensemble": Linear(0, 1)}),
            "rampup_epochs=5 and a schedule",
        ),
        (
            lambda: find_last_cut(
                Taps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)), None, 32)
            ),
            "Sequential has . stages, and none in front of the last",
        ),
        (
            lambda: PeerAttention(8, temperature=-1),
            "temperature is .*; allowed: a finite number above 0",
        ),
        (
            lambda: EnsembleClassifier(8, 2, 10, temperature=-1),
            "temperature is .*; allowed: a finite number above 0",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refusal_leaves_the_networks_as_they_were():
    given = nets(1) * 2
    before = list(given[0].modules())
    with pytest.raises(ValueError):
        Branches(given)
    assert all(a is b for a, b in zip(before, given[0].modules(), strict=True))


def test_a_join_of_ones_own():
    class Mean(nn.Module):
        terms = ("close",)

        def ensemble(self, team: BranchOutputs):
            return torch.stack(team.logits).mean(0)

        def forward(self, team: BranchOutputs, labels):
            assert not team.embeddings
            return {"close": functional.logits_mse(team.logits[0], team.logits[1])}

    method = Branches(
        nets(2), join=Mean(), weights={"close": 0.5}, cut="layer1", label_smoothing=0.1
    )
    step = method(batch_of(), Clock())
    assert set(step.losses) == {"ce", "ce/branch1", "close"} and step.losses["close"] > 0
    plain = Branches(nets(2))
    assert list(plain(batch_of(), Clock()).losses) == ["ce", "ce/branch1"]
    assert list(plain.predict(batch_of()["x"])) == ["student", "branch1"]
