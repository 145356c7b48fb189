"""Networks that teach themselves, BYOT and BAKE, on digits: the formulas, the gradients, and whole
runs."""

from __future__ import annotations

import copy

import paper_totals
import pytest
import timm
import torch

import kdtoolkit.methods.bake
import kdtoolkit.methods.byot  # noqa: F401  (registers the name)
from kdtoolkit import Callback, Taps, create_method, distill, functional
from kdtoolkit import data as room
from kdtoolkit.data.sampling import SameClass
from kdtoolkit.features.layout_conversion import as_map
from kdtoolkit.methods.bake import BAKE
from kdtoolkit.methods.byot import BYOT
from kdtoolkit.schedules import Linear
from kdtoolkit.types import Clock
from kdtoolkit.utils.signals import Interrupted

SIDE = 48  # pixels; digits are scaled up for the networks that need it
VIT = {"img_size": SIDE, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
NETS = {
    "cifar_resnet8": ("cifar_resnet8", {}, 16),
    "vit": ("vit_tiny_patch16_224", VIT, SIDE),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIDE,
            "patch_size": 4,
            "window_size": 3,
            "embed_dim": 12,
            "depths": (1, 1, 1),
            "num_heads": (1, 2, 2),
        },
        SIDE,
    ),
    "mobilenet": ("mobilenetv3_small_050", {}, SIDE),
}
METHODS = {"byot": BYOT, "bake": BAKE}


def net(name, seed=0):
    model, options, _ = NETS[name]
    torch.manual_seed(seed)
    return timm.create_model(model, num_classes=10, drop_rate=0.0, **options)


@pytest.fixture(scope="module")
def batches():
    """64 digits, 16 groups of one class, by the side of their images."""
    found = {}
    for side in (16, SIDE):
        data = room.load("digits", validation="none", image_size=side)
        loader = data.train.loader(64, sampling=SameClass(3))
        found[side] = data.prepare_batch(next(iter(loader)), epoch=0, train=False)
    return found


def build(method, name, **options):
    model = net(name)
    return create_method(method, Taps(model, None, NETS[name][2]), **options)


def total(step):
    return torch.stack(list(step.losses.values())).sum()


# ------------------------------------------------------------------------------------- the formulas
@pytest.mark.parametrize("exempt", [1, 2, None])
@pytest.mark.parametrize("name", ["cifar_resnet8", "vit", "swin"])
def test_byot_is_that_of_the_reference(name, exempt, batches):
    method, batch = build("byot", name, exempt=exempt).train(), batches[NETS[name][2]]
    before = copy.deepcopy(method.state_dict())
    torch.manual_seed(0)
    step = method(batch, Clock())
    assert set(step.losses) == {"ce", "ce/exits", "soft", "feature"} and set(step.logits) == {
        "student"
    }
    method.load_state_dict(before)
    torch.manual_seed(0)
    out = method.taps(method.preprocess(batch["x"]))
    last = len(method.taps.stages)
    deepest = as_map(out.feats[last], method.taps.boundary_of(-1).shape).mean((2, 3))
    found = [
        method.exits[f"exit{s}"](out.feats[s]) for s in range(last - 1, 0, -1)
    ]  # deepest first
    vectors, logits = [deepest, *(v for v, _ in found)], [out.logits, *(z for _, z in found)]
    torch.testing.assert_close(
        total(step), paper_totals.byot(logits, vectors, batch["y"], exempt=exempt)
    )
    plain = [type(e.hint).__name__ for e in method.exits.values()][::-1]
    assert plain == ["Identity" if k == exempt else "Linear" for k in range(1, last)]
    torch.testing.assert_close(step.losses["ce"], functional.ce(out.logits, batch["y"]))
    method.release()


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit", "mobilenet"])
def test_bake_is_that_of_the_reference(name, batches):
    method, batch = build("bake", name, omega=0.7, temperature=3.0).train(), batches[NETS[name][2]]
    torch.manual_seed(0)
    step = method(batch, Clock())
    torch.manual_seed(0)
    model, x = net(name).train(), method.preprocess(batch["x"])
    features = model.forward_features(x)
    embedding = model.forward_head(features, pre_logits=True)
    logits = model.get_classifier()(embedding)
    want = paper_totals.bake(logits, embedding, batch["y"], omega=0.7, temperature=3.0)
    torch.testing.assert_close(total(step), want)
    assert set(step.losses) == {"ce", "bake"} and method.batch_sampler == SameClass(3)
    method.release()


def test_weights_are_numbers_or_schedules(batches):
    batch, clock = batches[16], Clock(step=5, total_steps=10)
    for name, term in (("byot", "soft"), ("bake", "bake")):
        whole = build(name, "cifar_resnet8")(batch, clock).losses
        default = {"soft": 0.3, "bake": 1.0}[term]
        some = build(name, "cifar_resnet8", losses={"ce": 1.0, term: Linear(0.0, 1.0)})(
            batch, clock
        ).losses
        torch.testing.assert_close(some[term], whole[term] * 0.5 / default)
        off = [t for t in whole if t not in ("ce", term)]
        assert set(some) == set(whole) and all(
            some[t].item() == 0 and some[t].requires_grad for t in off
        )


# ------------------------------------------------------------------------------------- the contract
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", METHODS)
def test_gradients_reach_every_parameter(kind, name, batches):
    """With every term, and with each alone: what is switched off still has a gradient, zero, for
    DDP."""
    batch = batches[NETS[name][2]]
    terms = list(build(kind, name).weights)
    for losses in [None, *({term: 1.0} for term in terms if name == "cifar_resnet8")]:
        method = build(kind, name, losses=losses).train()
        step = method(batch, Clock())
        assert all(z.requires_grad and z.isfinite() and z.dim() == 0 for z in step.losses.values())
        total(step).backward()
        assert [n for n, p in method.named_parameters() if p.grad is None] == []
        names = [n for n, _ in method.named_parameters()]
        assert len(set(names)) == len(names)
        method.release()


def test_the_deepest_learns_nothing_from_its_exits(batches):
    """Targets are constants: the last stage and the classifier have the gradient of the
    cross-entropy alone."""
    grads = []
    for losses in ({"ce": 1.0}, None):
        method = build("byot", "cifar_resnet8", losses=losses, exempt=None).train()
        total(method(batches[16], Clock())).backward()
        grads.append({n: p.grad for n, p in method.student.named_parameters()})
    last = build("byot", "cifar_resnet8").taps.boundary_of(-1).name.split(".")[0]
    deep = [n for n in grads[0] if n.startswith((last, "fc."))]
    assert deep and all(torch.equal(grads[0][n], grads[1][n]) for n in deep)
    assert not torch.equal(grads[0]["conv1.weight"], grads[1]["conv1.weight"])


@pytest.mark.parametrize(("name", "lr", "steps"), [("cifar_resnet8", 5e-3, 30), ("vit", 2e-3, 80)])
@pytest.mark.parametrize("kind", METHODS)
def test_a_few_steps_overfit(kind, name, lr, steps, batches):
    """This ViT needs its 80 steps with the cross-entropy alone, too."""
    method, batch = build(kind, name).train(), batches[NETS[name][2]]
    optimizer = torch.optim.Adam(method.parameters(), lr=lr)
    for _ in range(steps):
        step = method(batch, Clock())
        optimizer.zero_grad()
        total(step).backward()
        optimizer.step()
    assert (step.logits["student"].argmax(1) == batch["y"]).float().mean() > 0.9
    with torch.no_grad():
        found = method.predict(batch["x"])
    if kind == "byot":
        assert all(
            (z.argmax(1) == batch["y"]).float().mean() > 0.6 for z in found.values()
        )  # running statistics lag


@pytest.mark.parametrize("kind", METHODS)
def test_state_dict_round_trip_and_copies(kind, batches):
    batch = batches[16]
    first, second = (
        create_method(kind, Taps(net("cifar_resnet8", seed), None, 16)).eval() for seed in (0, 1)
    )
    second.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    with torch.no_grad():
        for other in (second, copied):
            assert all(
                torch.equal(a, b)
                for a, b in zip(_values(first, batch), _values(other, batch), strict=True)
            )
        next(copied.parameters()).add_(1.0)
        assert not torch.equal(_values(first, batch)[-1], _values(copied, batch)[-1])
        torch.testing.assert_close(
            _values(first, batch)[-1], _values(second, batch)[-1], rtol=0, atol=0
        )


def _values(method, batch):
    return [*method(batch, Clock()).losses.values(), *method.predict(batch["x"]).values()]


def test_byot_evaluates_its_exits_and_their_ensemble(batches):
    method, x = build("byot", "cifar_resnet8").eval(), batches[16]["x"]
    with torch.no_grad():
        found = method.predict(x)
        assert list(found) == ["student", "exit1", "exit2", "ensemble"]
        torch.testing.assert_close(found["ensemble"], torch.stack(list(found.values())[:3]).mean(0))
        assert torch.equal(method.logits("student", x), found["student"])
        assert torch.equal(method.logits("exit1", x), found["exit1"])
    assert list(method.networks()) == ["student"] and method.export_candidates()[0] == ["student"]
    parts = method.plan()
    assert [r["loss"] for r in parts["losses"]] == [
        "ce",
        "ce/exits",
        "soft",
        "ce/exits",
        "soft",
        "feature",
    ]
    assert parts["parameters"]["exits"] == sum(p.numel() for p in method.exits.parameters())
    bare = method.student
    method.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())
    some = build("byot", "cifar_resnet8", stages=[1])
    assert list(some.exits) == ["exit1"]
    assert some(batches[16], Clock()).losses["feature"].item() == 0  # the only exit is exempt


def test_bake_leaves_no_hooks_and_may_draw_evenly():
    method = build("bake", "cifar_resnet8", partners=0)
    assert method.batch_sampler is None and build(
        "bake", "cifar_resnet8", partners=1
    ).batch_sampler == SameClass(1)
    method.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in method.student.modules())


@pytest.mark.parametrize("kind", METHODS)
def test_under_autocast(kind, batches):
    method = build(kind, "cifar_resnet8").train()
    full = method(batches[16], Clock()).losses
    with torch.autocast("cpu", torch.bfloat16):
        half = method(batches[16], Clock()).losses
    for term, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full[term], rtol=0.05, atol=0.01)


ERRORS = {
    "temperature": (
        "byot",
        {"temperature": 0.0},
        "temperature is .*; allowed: a finite number above 0",
    ),
    "exempt": (
        "byot",
        {"exempt": 3},
        r"exempt=3: number of an exit, 1 is the deepest of 2, or None",
    ),
    "last stage": (
        "byot",
        {"stages": [3]},
        r"stages=\[3\]: 'all', or different numbers from 1 to 2; behind the last",
    ),
    "no stage": ("byot", {"stages": []}, r"stages=\[\]"),
    "twice": ("byot", {"stages": [1, 1]}, r"stages=\[1, 1\]"),
    "loss": ("byot", {"losses": {"features": 1.0}}, r"unknown loss 'features'"),
    "omega": ("bake", {"omega": 1.0}, r"omega is 1\.0; allowed: .* \(share of the neighbours"),
    "partners": (
        "bake",
        {"partners": -1},
        "partners of SameClass is -1; allowed: a whole number from 0",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    kind, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        build(kind, "cifar_resnet8", **options)


@pytest.mark.parametrize("cls", METHODS.values())
def test_unknown_terms_are_refused(cls):
    with pytest.raises(ValueError, match="unknown loss 'kd'.*Known: ce"):
        cls(Taps(net("cifar_resnet8"), None, 16), {"kd": 1.0})


# --------------------------------------------------------------------------------------- whole runs
RUN = {
    "train_limit": 128,
    "validation": 64,
    "batch_size": 32,
    "lr": 0.05,
    "progress": "off",
    "num_workers": 0,
    "log_every": 1,
}


class StopAt(Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, run, step):
        if run.clock.step == self.at:
            run.stop = "interrupted"


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_stops_and_goes_on_to_the_same_weights(kind, tmp_path):
    def run(folder, **options):
        torch.manual_seed(7)
        return distill(
            None,
            "cifar_resnet8",
            "digits",
            method=kind,
            epochs=2,
            output_dir=folder,
            figures=False,
            **RUN,
            **options,
        )

    whole = run(tmp_path / "whole")
    per_epoch = 128 // (32 // 4) if kind == "bake" else 128 // 32
    assert whole.history[-1]["step"] == 2 * per_epoch
    with pytest.raises(Interrupted):
        run(
            tmp_path / "part", callbacks=[StopAt(per_epoch + 2)]
        )  # in the middle of the second epoch
    resumed = run(tmp_path / "part", resume="auto")
    a, b = whole.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resumed.student.modules())
    timm.create_model(f"local-dir:{tmp_path / 'part' / 'student'}", pretrained=True)
