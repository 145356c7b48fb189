"""Losses of a frozen teacher beside a strategy: kd + dml, at + dml, kd + one, at + sokd, ..."""

from __future__ import annotations

import copy
import functools
import os
import signal

import pytest
import timm
import torch
from sklearn.datasets import load_digits

from kdtoolkit import Callback, distill, functional, register_strategy
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES, METHODS, register_loss
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses import KD
from kdtoolkit.methods.factory import create_method
from kdtoolkit.methods.resolve import default_losses
from kdtoolkit.schedules import Linear
from kdtoolkit.types import Clock
from kdtoolkit.utils.signals import Interrupted

IMAGE = (16, 16)
STAGES = [1, 2, 3]
RUN = {
    "train_limit": 64, "batch_size": 32, "progress": "off", "lr": 0.05, "num_workers": 0,
    "allow_weak_teacher": True, "validation": "none", "figures": False,
}  # fmt: skip


@pytest.fixture
def clean_registries(monkeypatch):
    for registry in (LOSSES, METHODS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


def net(name="cifar_resnet8", seed=0, classes=10):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes)


@functools.cache
def trained_statistics(name, seed):
    made = net(name, seed)
    with torch.no_grad():
        made.train()(torch.randn(16, 3, *IMAGE))
    return made.eval()


def teacher_net(name="cifar_wrn16_1", seed=1):
    return copy.deepcopy(trained_statistics(name, seed))


def build(method, teachers=("cifar_wrn16_1",), **options):
    frozen = [Frozen(teacher_net(t, k), None, 16, image=IMAGE) for k, t in enumerate(teachers, 1)]
    taps = Taps(net(), None, 16)
    torch.manual_seed(7)
    return create_method(method, taps, frozen, image=IMAGE, **options)


def batch_of(views=1, count=8):
    data = load_digits()
    x = torch.tensor(data.images[:count, None] / 16, dtype=torch.float32)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    batch = {"x": x, "y": torch.tensor(data.target[:count]), "index": torch.arange(count)}
    if views > 1:
        batch["views"] = torch.stack([x.roll(k, 3) for k in range(views)], 1)
    return batch


def run_step(method, **clock):
    batch = batch_of(method.num_views)
    torch.manual_seed(3)
    return method(batch, Clock(**clock)), batch


# --------------------------------------------------------------------------------- values by hand
@pytest.mark.parametrize("order", [["kd", "dml"], ["dml", "kd"]])
def test_kd_and_dml_is_dml_and_kd_of_every_peer(order):
    method = build(order, teachers=["cifar_resnet14"])
    assert default_losses(order) == {"ce": 1.0, "kd": 0.9, "mutual": 1.0}
    step, batch = run_step(method)
    assert list(step.losses) == ["ce", "ce/peer1", "kd", "kd/peer1"]
    target = method.teachers[0](batch["x"]).logits
    for loss, name in (("kd", "student"), ("kd/peer1", "peer1")):
        want = 0.9 * functional.kd(step.logits[name], target, temperature=4.0)
        assert torch.equal(step.losses[loss], want), loss
    sum(step.losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    assert all(p.grad is None for p in method.teachers[0].model.parameters())
    assert [c.name for c in method.callbacks] == ["mutual"]  # mutual learning as without a teacher


def test_at_and_dml_reads_the_features_of_every_peer():
    method = build(["at", "dml"], peers=[net("cifar_resnet14", 5)], p=2)
    copies = copy.deepcopy(dict(method.networks()))
    step, batch = run_step(method)
    teacher = method.teachers[0](batch["x"])
    for loss, name in (("at", "student"), ("at/peer1", "peer1")):
        ours = Taps(copies[name], STAGES, 16)(method.preprocess[name](batch["x"]))
        want = functional.at(list(ours.feats.values()), list(teacher.feats.values()), p=2)
        torch.testing.assert_close(step.losses[loss], 1000 * want)


def test_every_peer_has_adapters_of_its_own():
    method = build(["fitnet", "dml"], peers=3, hint=3)
    step, _ = run_step(method)
    sum(step.losses.values()).backward()
    own = [dict(method.teacher_losses[n].named_parameters()) for n in method.networks()]
    assert all(own) and len({id(p) for ps in own for p in ps.values()}) == 3 * len(own[0])
    assert all(p.grad is not None and p.grad.any() for ps in own for p in ps.values())
    groups = method.clip_groups()
    assert len(groups) == 3
    assert sum(map(len, groups)) == len(list(method.parameters()))
    assert method.trainable_parameters().keys() == dict(method.named_parameters()).keys()


def test_a_teacher_sees_the_view_of_the_network_that_it_teaches():
    method = build(["kd", "kdcl"], temperature=2.0)
    step, batch = run_step(method)
    assert method.num_views == 2
    for k, (loss, name) in enumerate((("kd", "student"), ("kd/peer1", "peer1"))):
        target = method.teachers[0](batch["views"][:, k]).logits
        want = 0.9 * functional.kd(step.logits[name], target, temperature=2.0)
        assert torch.equal(step.losses[loss], want)


@pytest.mark.parametrize("name", ["one", "cl", "okddip", "pcl"])
def test_every_branch_learns_from_the_teacher(name):
    losses = METHODS[name].losses | {"kd": 0.5, "at": 10.0}
    method = build(name, losses=losses, branches=3)
    copies = {n: copy.deepcopy(t) for n, t in method.networks().items()}
    step, batch = run_step(method)
    for k, branch in enumerate(method.networks()):
        x = batch["x"] if method.num_views == 1 else batch["views"][:, k]
        suffix = "" if k == 0 else f"/{branch}"
        teacher = method.teachers[0](x)
        kd = functional.kd(step.logits[branch], teacher.logits, temperature=4.0)
        assert torch.equal(step.losses["kd" + suffix], 0.5 * kd)
        ours = Taps(copies[branch].train(), STAGES, 16)(method.preprocess(x))
        want = functional.at([ours.feats[s] for s in STAGES], [teacher.feats[s] for s in STAGES])
        torch.testing.assert_close(step.losses["at" + suffix], 10 * want, rtol=1e-4, atol=1e-6)
    alone = build(name, teachers=[], branches=3)
    torch.testing.assert_close(
        {k: v for k, v in step.losses.items() if not k.startswith(("kd", "at"))},
        run_step(alone)[0].losses,
    )


@pytest.mark.parametrize("name", ["mean_teacher", "byot", "bake", "dkel", "dcl"])
def test_all_other_strategies_take_a_teacher_too(name):
    method = build(["kd", "fitnet", name], hint=2)
    step, batch = run_step(method)
    x = batch["x"] if method.num_views == 1 else batch["views"][:, 0]
    want = functional.kd(step.logits["student"], method.teachers[0](x).logits, temperature=4.0)
    assert torch.equal(step.losses["kd"], 0.9 * want) and step.losses["fitnet"] > 0
    networks = list(method.networks())
    assert {k for k in step.losses if k.startswith("kd")} == {
        "kd" if n == "student" else f"kd/{n}" for n in networks
    }
    sum(step.losses.values()).backward()
    assert all(p.grad is not None for p in method.teacher_losses.parameters())
    assert all(p.grad is None for p in method.teachers[0].model.parameters())
    clone = method.clone()  # as an average keeps it
    assert clone.state_dict().keys() == method.state_dict().keys()
    again = clone.train_logits(batch)
    assert list(again) == networks
    method.release()
    clone.release()
    nets = [*method.networks().values(), method.teachers[0].model]
    assert not any(m._forward_hooks for n in nets for m in n.modules())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("cut", [1, "auto"])
def test_sokd_and_at_compares_branch_and_student(cut, mode):
    method = build(["sokd", "at"], cut=cut, teacher_mode=mode)
    assert default_losses(["sokd", "at"]) == METHODS["sokd"].losses | {"at": 1000.0}
    network = copy.deepcopy(method.branch.network)
    student = copy.deepcopy(method.student)
    drift = copy.deepcopy(method.drift)
    step, batch = run_step(method)
    plain = run_step(build("sokd", cut=cut, teacher_mode=mode))[0].losses
    assert {k: v for k, v in step.losses.items() if k != "at"} == plain
    ours = Taps(student, STAGES, 16)(method.preprocess(batch["x"]))
    prepared = method.teachers[0].preprocess(batch["x"])
    front = drift(prepared).feats if drift else method.teachers[0](batch["x"]).feats
    last = 1 if cut == 1 else 2
    behind = Taps(network, STAGES, 16).forward_from(prepared, last, front[last]).feats
    theirs = [front[s] if s <= last else behind[s] for s in STAGES]
    want = 1000 * functional.at([ours.feats[s] for s in STAGES], theirs)
    torch.testing.assert_close(step.losses["at"], want, rtol=1e-4, atol=1e-6)
    step.losses["at"].backward()
    assert all(p.grad is not None for n, p in method.student.named_parameters() if "layer" in n)
    assert all(p.grad is None for p in method.branch.parameters())
    assert all(p.grad is None for p in method.teachers[0].model.parameters())


@pytest.mark.parametrize("loss", ["fitnet", "sp", "logits", "srkd"])
def test_sokd_takes_every_loss_that_compares(loss):
    own = {"reset": ()} if loss == "srkd" else {}
    method = build(
        ["sokd", loss], losses=METHODS["sokd"].losses | {loss: 2.0, "feature": 1.0}, **own
    )
    step, _ = run_step(method)
    assert step.losses[loss] > 0 and step.losses["feature"] > 0
    sum(step.losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    (row, *_), plan = [r for r in method.plan()["losses"] if r["loss"] == loss], method.plan()
    assert row["teacher"].startswith("branch ") and row["student"].startswith("student ")
    assert "adapters" in plan["parameters"] and str(row["weight"]) == "2.0"


def test_srkd_runs_the_teacher_on_the_features_of_every_peer():
    method = build(["srkd", "dml"])
    step, _ = run_step(method)
    assert list(default_losses(["srkd", "dml"])) == ["ce", "mutual", "kd", "srkd"]
    for term in ("srkd", "srkd/peer1"):
        assert step.losses[term] > 0
    sum(step.losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.teacher_losses.parameters())


def test_two_teachers_share_the_weight():
    method = build(["kd", "dml"], teachers=["cifar_wrn16_1", "cifar_resnet14"])
    step, batch = run_step(method)
    assert [k for k in step.losses if "kd" in k] == [
        "kd/0", "kd/1", "kd/0/peer1", "kd/1/peer1",
    ]  # fmt: skip
    target = method.teachers[1](batch["x"]).logits
    want = 0.45 * functional.kd(step.logits["peer1"], target, temperature=4.0)
    assert torch.equal(step.losses["kd/1/peer1"], want)
    assert {"teacher/0", "teacher/1", "adapters"} <= method.plan()["parameters"].keys()


def test_a_teacher_runs_once_for_all_that_see_the_same_images_and_not_for_weight_zero():
    method = build(
        "dml", losses={"ce": 1.0, "mutual": 1.0, "kd": Linear(0.0, 1.0), "at": 0.0}, peers=3
    )
    calls = []
    method.teachers[0].model.register_forward_hook(lambda *a: calls.append(1))
    step, _ = run_step(method)
    assert not calls and all(step.losses[k] == 0 for k in step.losses if "ce" not in k)
    sum(step.losses.values()).backward()
    assert all(p.grad is not None for p in method.parameters())
    run_step(method, step=5, total_steps=10)
    assert calls == [1]


def test_options_go_to_every_part_that_has_them():
    method = build(["kd", "at", "dml"], temperature=3.0, p=3, peers=3, layers=[(2, 2)])
    losses = method.teacher_losses.losses_of("peer2")
    assert losses["kd"].temperature == 3.0 == method.callbacks[0].temperature
    assert losses["at"].p == 3 and losses["at"].pairs == [(2, 2)] and len(method.networks()) == 3


# ------------------------------------------------------------------------------------------- runs
class Keep(Callback):
    def __init__(self, stop=None):
        self.losses, self.stop = {}, stop

    def on_step_end(self, run, step):
        self.losses[run.clock.step] = {k: v.item() for k, v in step.losses.items()}
        if run.clock.step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


def train(method, kept=None, teacher=None, **options):
    callbacks = [kept] if kept else []
    given = {**RUN, "max_steps": 3, **options}
    return distill(teacher, "cifar_resnet8", "digits", method=method, callbacks=callbacks, **given)


@pytest.mark.parametrize("name", ["dml", "one", "sokd"])
def test_weight_zero_is_the_strategy_alone_to_the_last_digit(name):
    kept, alone, teacher = Keep(), Keep(), teacher_net("cifar_resnet14")
    losses = METHODS[name].losses
    zero = {"kd": 0.0, "fitnet": 0.0} if name != "sokd" else {"fitnet": 0.0}
    one = train(name, kept, teacher, losses=losses | zero)
    two = train(name, alone, teacher if name == "sokd" else None)
    assert len(kept.losses) == 3
    for step, row in alone.losses.items():
        more = kept.losses[step]
        assert {k: v for k, v in more.items() if k in row} == row
        assert len(more) > len(row) and not any(v for k, v in more.items() if k not in row)
    for network, model in two.networks.items():
        state = one.networks[network].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), network


@pytest.mark.parametrize("method", [["fitnet", "kd", "dml"], ["sokd", "fitnet"], ["fitnet", "pcl"]])
def test_resume_gives_the_same_steps_and_the_teacher_is_in_no_checkpoint(method, tmp_path):
    whole, first, second, teacher = Keep(), Keep(stop=2), Keep(), teacher_net()
    before = copy.deepcopy(teacher.state_dict())
    same = {"max_steps": 4, "report_to": "none", "teacher": teacher}
    wanted = train(method, whole, output_dir=tmp_path / "whole", **same)
    with pytest.raises(Interrupted):
        train(method, first, output_dir=tmp_path / "run", **same)
    result = train(method, second, output_dir=tmp_path / "run", resume=True, **same)
    assert {**first.losses, **second.losses} == whole.losses and min(second.losses) == 3
    for network, model in wanted.networks.items():
        state = result.networks[network].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), network
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for m in teacher.modules())
    assert not any(m._forward_hooks for n in result.networks.values() for m in n.modules())
    assert "teacher_top1" in result.metrics or "teacher" in str(result.metrics)


def test_the_teacher_is_evaluated_and_planned():
    plan = train(["at", "kd", "dml"], teacher="cifar_resnet14", dry_run=True).plan
    rows = {row["loss"]: row for row in plan["losses"]}
    assert {"ce", "ce/peer1", "mutual", "kd", "kd/peer1", "at", "at/peer1"} <= rows.keys()
    assert rows["kd/peer1"]["student"] == "peer1 logits"
    assert rows["kd/peer1"]["teacher"] == "teacher logits" and rows["kd/peer1"]["weight"] == 0.9
    assert rows["at/peer1"]["student"].startswith("peer1 layer3") and rows["at"]["teacher_shape"]
    assert plan["parameters"]["teacher"] > 0 and plan["models"]["teacher"] == "cifar_resnet14"
    assert "kd/peer1" in str(plan)
    plan = train(["fitnet", "one"], teacher="cifar_resnet14", dry_run=True).plan
    rows = [row["student"] for row in plan["losses"] if row["loss"] == "fitnet/branch2"]
    assert rows and all(row.startswith("branch2 ") for row in rows)
    assert plan["parameters"]["adapters"] > 0


@pytest.mark.usefixtures("clean_registries")
def test_a_loss_without_a_teacher_may_stand_beside_a_strategy():
    @register_loss("flat_test", losses={"ce": 1.0, "flat_test": 0.1})
    class Flat(DistillationLoss):
        """Probabilities that are flat."""

        needs_teacher = False
        needs_taps = False

        def forward(self, student, teacher, batch):
            return -student.logits.log_softmax(1).mean()

    method = build(["flat_test", "dml"], teachers=[])
    step, _ = run_step(method)
    want = -0.1 * step.logits["peer1"].log_softmax(1).mean()
    assert torch.equal(step.losses["flat_test/peer1"], want)
    assert method.plan()["losses"][-1]["teacher"] == "labels"
    with pytest.raises(ValueError, match="uses no teacher, its networks teach each other"):
        train(["flat_test", "dml"], teacher="cifar_resnet14", dry_run=True)


# ----------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "method, given, message",
    [
        (["dml", "one"], {}, "'dml' and 'one' are strategies.*name one of them"),
        (["kd", "dml", "cl", "one"], {}, "'dml' and 'cl' and 'one' are strategies"),
        (["kd", "dml"], {"teacher": None}, "needs a teacher for 'kd' and teacher=None"),
        ("one", {"teacher": None, "losses": {"ce": 1, "at": 1}}, "needs a teacher for 'at'"),
        ("dml", {}, "uses no teacher.*method=\\['kd', 'dml'\\]"),
        (["kd", "dml"], {"losses": {"ce": 1.0, "mutual": 1.0}}, "uses no teacher"),
        (["kd", "sokd"], {}, "'kd' beside a strategy whose own terms are ce, kd.*adds no loss"),
        (["none", "dml"], {"teacher": None}, "'none' beside a strategy"),
        (["kd", "dlm"], {}, "did you mean 'dml'"),
        (["kd", "dml"], {"losses": {"ce": 1, "kdd": 1}}, "unknown loss 'kdd'; did you mean 'kd'"),
        (["kd", "dml"], {"losses": {"ce": 1, "kd": -1}}, "weight of loss 'kd' is -1"),
        (["kd", "dml"], {"layers": [(1, 1)]}, "layers=.* has no effect"),
        (["kd", "dcl"], {"p": 2}, "unknown option 'p'"),
        (["at", "dcl"], {"temperature": 2.0}, "temperature has no effect"),
        (["sokd", "srkd"], {}, "cannot run on the student's features.*reset=\\(\\)"),
        (["at", "dml"], {"layers": [("layer9", 1)]}, "layer9"),
    ],
)
def test_what_is_refused(method, given, message):
    given = {"teacher": "cifar_resnet14", **given}
    with pytest.raises(ValueError, match=message):
        train(method, dry_run=True, **given)


@pytest.mark.usefixtures("clean_registries")
def test_objects_shared_networks_and_other_methods_are_refused():
    student, teacher = net(), net("cifar_resnet14")
    loss = KD(Taps(student, None, 16), Frozen(copy.deepcopy(teacher), None, 16))
    with pytest.raises(ValueError, match="'kd' as an object: 'dml' is a strategy"):
        train([loss, "dml"], teacher=teacher, dry_run=True)
    taps, frozen = Taps(student, None, 16), Frozen(teacher, None, 16)
    with pytest.raises(ValueError, match="network 'peer1' shares parameters with a frozen"):
        create_method(["kd", "dml"], taps, [frozen], image=IMAGE, peers=[teacher])
    assert not any(m._forward_hooks for m in student.modules())

    @register_strategy("own_test", losses={"ce": 1.0})
    def own(inputs):
        """A method of its own."""
        return Method()

    with pytest.raises(ValueError, match="A method of its own. takes no losses beside its own"):
        build(["kd", "own_test"])
