"""Every method of several networks by name: one contract, on digits, through distill()."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import signal

import pytest
import timm
import torch

from kdtoolkit import Callback, distill, list_methods
from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.decaying import DecayingEnsemble
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.methods.branches import Branches
from kdtoolkit.methods.peers import Peers
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.signals import Interrupted

NAMES = [name for name in list_methods() if isinstance(METHODS[name], StrategySpec)]
RUN = {"train_limit": 96, "batch_size": 32, "progress": "off", "lr": 0.05, "num_workers": 0}
RUN["allow_weak_teacher"] = True  # of sokd: one epoch of 96 images
OWN = {"mean_teacher": {"labelled": 48}}  # rows with labels
EMA_OF_BRANCHES = ["ema", "ema/branch1", "ema/branch2"]
EXPORTED = {  # what these papers use for inference; others are not checked
    "okddip": ["student"],
    "mean_teacher": ["ema"],
    "pcl": EMA_OF_BRANCHES,
    "dkel": EMA_OF_BRANCHES,
}
every_strategy = pytest.mark.parametrize("name", NAMES)


@functools.cache
def teacher():
    torch.manual_seed(3)
    net = timm.create_model("cifar_resnet14", num_classes=10)
    distill(None, net, "digits", method="none", epochs=1, validation="none", **RUN)
    return net


class Keep(Callback):
    """Losses after every step, networks that may be exported; a signal after one of the steps."""

    def __init__(self, stop=None):
        self.losses, self.stop, self.candidates = {}, stop, []

    def on_step_end(self, run, step):
        self.losses[run.clock.step] = {k: v.item() for k, v in step.losses.items()}
        if run.clock.step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_end(self, run, metrics):
        self.candidates = run.export_candidates()[0]


def train(name, kept=None, **options):
    student = options.pop("student", "cifar_resnet8")
    given = {**RUN, **OWN.get(name, {}), **options}
    own = teacher() if METHODS[name].needs_teacher else None
    return distill(own, student, "digits", method=name, callbacks=[kept] if kept else [], **given)


@every_strategy
def test_loss_difference_and_options_are_documented(name):
    build = METHODS[name].build
    module_doc = inspect.getmodule(build).__doc__
    assert "\nLoss: " in module_doc and "\nDiffers: " in module_doc
    described = set(re.findall(r"^    (\w+): ", inspect.getdoc(build), re.MULTILINE))
    assert set(METHODS[name].options) <= described


def trained_terms(name):
    """Losses of the strategy whose default weight is not 0."""
    return {term for term, weight in METHODS[name].losses.items() if callable(weight) or weight}


def with_families(losses):
    """Names of losses, and those that "<name>/<network>" begins with."""
    return set(losses) | {loss.rpartition("/")[0] for loss in losses}


@every_strategy
def test_all_networks_are_evaluated_the_exported_one_is_named_and_all_are_saved(name, tmp_path):
    kept, folder = Keep(), tmp_path / "run"
    saves = {"output_dir": folder, "keep": "all", "report_to": "none", "figures": False}
    result = train(name, kept, epochs=2, validation=64, **saves)
    networks, exported = result.networks, result.metrics["exported"]
    assert exported in kept.candidates == EXPORTED.get(name, kept.candidates)
    assert set(kept.candidates) <= set(networks) and result.metrics["exported_reason"]
    assert result.student is networks[exported]
    assert not any(m._forward_hooks for net in networks.values() for m in net.modules())

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(networks) <= {row["network"] for row in rows if row["event"] == "eval"}
    columns = {column for row in rows if row["event"] == "epoch" for column in row}
    losses = {column.removeprefix("loss/") for column in columns if column.startswith("loss/")}
    assert trained_terms(name) <= with_families(losses)
    if len(networks) > 1:
        top1 = result.metrics["networks"]
        assert set(networks) <= set(top1) and top1[exported] == result.metrics["top1"]
        trained = [n for n in networks if not n.startswith("ema")]
        assert ("ensemble" in top1) == (len(trained) > 1)

    x = torch.rand(4, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.student(x))
    others = {n.replace("/", "-") for n in networks if n != exported}
    saved = folder / "networks"
    assert {p.name for p in saved.iterdir()} == others if others else not saved.exists()


@pytest.mark.parametrize(
    "name, own",
    [*((name, {}) for name in NAMES), ("dcl", {"batches": "own", "redraw": "head", "every": 2})],
    ids=str,
)
def test_resume_in_the_middle_of_an_epoch_gives_the_same_third_step(name, own, tmp_path):
    same = own | {"epochs": 2, "validation": "none", "optimizer": "nesterov", "report_to": "none"}
    same["figures"] = False
    whole, first, second = Keep(), Keep(stop=2), Keep()
    wanted = train(name, whole, output_dir=tmp_path / "whole", **same)
    with pytest.raises(Interrupted):
        train(name, first, output_dir=tmp_path / "broken", **same)
    result = train(name, second, output_dir=tmp_path / "broken", resume=True, **same)
    assert {**first.losses, **second.losses} == whole.losses and min(second.losses) == 3
    assert list(second.losses) == list(whole.losses)[2:]
    for network, net in wanted.networks.items():
        state = result.networks[network].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), network
    assert result.metrics["top1"] == wanted.metrics["top1"]


@every_strategy
def test_it_learns(name):
    kept = Keep()
    adam = {"optimizer": "adam", "lr": 5e-3, "weight_decay": 0.0, "scheduler": "constant"}
    train(name, kept, max_steps=42, validation="none", **adam)
    course = [row["ce"] for row in kept.losses.values()]
    assert sum(course[-6:]) < 0.85 * sum(course[:6]), course


@every_strategy
def test_dry_run_plans_every_loss(name):
    own = "cifar_resnet14" if METHODS[name].needs_teacher else None
    plan = distill(own, "cifar_resnet8", "digits", method=name, dry_run=True).plan
    assert trained_terms(name) <= with_families({row["loss"] for row in plan["losses"]})
    assert str(plan)


@pytest.mark.parametrize(
    "name, off",
    [
        ("dml", {"losses": {"ce": 1.0}}),
        ("kdcl", {"losses": {"ce": 1.0}, "views": False}),
        ("dcl", {"beta": 0.0}),
    ],
)
def test_with_every_mutual_weight_at_zero_the_student_trains_as_it_would_alone(name, off):
    kept, alone = Keep(), Keep()
    same = {"epochs": 2, "validation": "none", "student_args": {"drop_rate": 0.2}}
    result = train(name, kept, **same, **off)
    single = distill(
        None, "cifar_resnet8", "digits", method="none", callbacks=[alone], **RUN, **same
    )
    assert {n: row["ce"] for n, row in kept.losses.items()} == {
        n: row["ce"] for n, row in alone.losses.items()
    }
    state = result.networks["student"].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in single.student.state_dict().items())


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"name": "dml", "losses": {"ce": 1, "mutal": 1}},
            "unknown loss 'mutal'; did you mean 'mutual'",
        ),
        ({"name": "dml", "peeers": 3}, "unknown option 'peeers'.*did you mean 'peers'"),
        ({"name": "dml", "peers": 1}, "peers is 1"),
        ({"name": "dcl", "temperature": 2.0}, "temperature has no effect: method 'dcl' has none"),
        ({"name": "dcl", "layers": [(1, 1)]}, "layers=.* has no effect"),
        ({"name": "one", "freeze": 1}, "freeze=1 is for one student and its teachers"),
        ({"name": "kdcl", "labelled": 48}, "training rows have no label"),
        ({"name": "one", "compile": True}, "compile=True: branches"),
        ({"name": "dml", "keep": "some"}, "keep is 'some'; allowed: 'exported', 'all'"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        train(epochs=1, **given)


def test_a_strategy_stands_beside_no_other_and_says_whether_it_wants_a_teacher():
    with pytest.raises(ValueError, match="'dml' and 'kdcl' are strategies, which build their own"):
        distill(None, "cifar_resnet8", "digits", method=["dml", "kdcl"])
    with pytest.raises(ValueError, match="uses no teacher, its networks teach each other"):
        distill(teacher(), "cifar_resnet8", "digits", method="dml")
    with pytest.raises(ValueError, match="method 'sokd' needs a teacher"):
        distill(None, "cifar_resnet8", "digits", method="sokd")


def test_peers_of_other_architectures_by_name():
    result = train("dml", epochs=1, validation="none", peers=["cifar_resnet14", "cifar_wrn16_1"])
    kinds = {
        name: sum(p.numel() for p in net.parameters()) for name, net in result.networks.items()
    }
    assert len(set(kinds.values())) == 3 and result.metrics["exported"] == "student"
    assert result.metrics["exported_reason"] == "it is the network that was passed as student"


def branches():
    torch.manual_seed(0)
    return Branches(
        timm.create_model("cifar_resnet8", num_classes=10), cut=1, branches=2, views=True
    )


def peers():
    torch.manual_seed(0)
    return Peers([timm.create_model("cifar_resnet8", num_classes=10) for _ in range(2)])


CALLBACKS = {
    "dcl": lambda: DCLMerger(2, rule="mean", beta=0.5, statistics="merged", momentum="merged"),
    "ema": lambda: EMATeacher(0.5),
    "decaying": lambda: DecayingEnsemble(0.5),
    "mutual": lambda: MutualKL(0.5),
}


@pytest.mark.parametrize("team", [peers, branches])
@pytest.mark.parametrize("which", [*([name] for name in CALLBACKS), list(CALLBACKS)], ids="-".join)
def test_each_callback_alone_and_all_together_on_peers_and_on_branches(team, which):
    kept, method = Keep(), team()
    used = [CALLBACKS[name]() for name in which]
    result = distill(
        None,
        None,
        "digits",
        method=method,
        callbacks=[*used, kept],
        epochs=1,
        validation="none",
        **RUN,
    )
    assert result.metrics["exported"] == ("ema" if "ema" in which else "student")
    rows = [row for row in result.history if row["event"] == "epoch"]
    assert all(rows[-1][f"loss/{name}"] > 0 for name in which if name != "dcl")
    if "dcl" in which and len(which) == 1:
        first, second = (dict(net.named_parameters()) for net in result.networks.values())
        own = [name for name in first if first[name] is not second[name]]
        assert own and (team is peers or len(own) < len(first))


def test_dcl_on_branches_merges_what_lies_behind_the_cut():
    method = branches()
    nets = list(method.networks().values())
    before = [{n: p.detach().clone() for n, p in net.named_parameters()} for net in nets]
    DCLMerger(1, rule="mean", beta=1.0).merge(nets)
    for name in before[0]:
        mean = (before[0][name] + before[1][name]) / 2
        for net, old in zip(nets, before, strict=True):
            shared = torch.equal(before[0][name], before[1][name])
            torch.testing.assert_close(
                dict(net.named_parameters())[name], old[name] if shared else mean
            )


def test_a_student_of_a_frozen_teacher_may_have_an_ema_too():
    ema = EMATeacher(1.0, learn_from="own", loss="mse")
    same = {"epochs": 1, "validation": "none", "callbacks": [ema]}
    result = distill(teacher(), "cifar_resnet8", "digits", method=["kd", "at"], **RUN, **same)
    assert set(result.networks) == {"student", "ema"} and result.metrics["exported"] == "ema"
    assert not any(m._forward_hooks for m in result.student.modules())


# ------------------------------------------------------------------ what must not cost a user a run
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose folder others may claim."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train("dml", epochs=1, validation="none", output_dir=folder, report_to="none")
    return folder


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": "one", "compile": True}, "compile=True: branches are run"),
        ({"name": "one", "rampup_epochs": -1}, "length is -1; allowed: a finite number from 0"),
        ({"name": "dkel", "init_steps": 99}, "init_steps=99, an epoch has 3 batches"),
        ({"name": "kdcl", "transforms": "none"}, "sees 2 views of every image"),
        ({"name": "kdcl", "rule": "general", "validation": "none"}, "KDCL\\(rule='general'\\)"),
        (
            {"name": "dcl", "peers": ["cifar_resnet14"]},
            "DCLMerger merges networks of one architecture",
        ),
        ({"name": "dml", "callbacks": [MutualKL()]}, "two callbacks are named 'mutual'"),
        ({"name": "bake", "callbacks": [MutualKL()]}, "MutualKL needs two networks"),
        (
            {"name": "dml", "teacher_head": "finetune"},
            "teacher_head has no effect: method 'dml' has no teacher",
        ),
    ],
)
def test_a_mistake_costs_no_finished_run(given, message, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    options = {**RUN, "epochs": 1, **given}
    name = options.pop("name")
    with pytest.raises(ValueError, match=message):
        distill(
            None,
            "cifar_resnet8",
            "digits",
            method=name,
            output_dir=finished,
            overwrite=True,
            **options,
        )
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 2.0},
        {"peers": 3},
        {"labelled": 90},
        {"callbacks": [EMATeacher()]},
        {"grad_clip": 1.0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_run_goes_on_with_its_own_settings_only(changed, finished):
    config = (finished / "config.yaml").read_bytes()
    train_again = {**RUN, "epochs": 1, "validation": "none", **changed}
    with pytest.raises((CheckpointError, ValueError)):
        distill(
            None,
            "cifar_resnet8",
            "digits",
            method="dml",
            output_dir=finished,
            resume=True,
            **train_again,
        )
    assert (finished / "config.yaml").read_bytes() == config
    assert "temperature: 1.0" in config.decode() and "peers: 2" in config.decode()


def test_dcl_by_epochs_hands_over_the_network_that_was_evaluated():
    result = train(
        "dcl",
        epochs=2,
        validation=96,
        every=1,
        unit="epochs",
        beta=0.5,
        rule="mean",
        train_limit=192,
    )
    again = distill(
        None,
        result.student,
        "digits",
        method="none",
        max_steps=1,
        batch_size=32,
        lr=1e-30,  # changes no weight
        momentum=0.0,
        freeze="backbone",
        validation="none",
        progress="off",
        weight_decay=0.0,
    )
    assert again.metrics["top1"] == result.metrics["top1"]


def test_frozen_parts_are_neither_merged_nor_drawn_anew():
    net = timm.create_model("cifar_resnet8", num_classes=10)
    net.layer1.requires_grad_(False)
    before = {n: p.clone() for n, p in net.layer1.named_parameters()}
    result = distill(None, net, "digits", method="dcl", every=1, epochs=1, validation="none", **RUN)
    for trained in result.networks.values():
        assert all(torch.equal(p, before[n]) for n, p in trained.layer1.named_parameters())
    pair = [timm.create_model("cifar_resnet8", num_classes=10) for _ in range(2)]
    pair[1].conv1.requires_grad_(False)
    with pytest.raises(ValueError, match="other parameters of peer1 are frozen"):
        distill(None, None, "digits", method=Peers(pair), callbacks=[DCLMerger()], epochs=1, **RUN)


def test_students_with_weights_share_a_trunk_and_are_no_twins(tmp_path):
    train("dml", epochs=1, validation="none", output_dir=tmp_path / "first", report_to="none")
    folder = str(tmp_path / "first" / "student")
    result = train("one", student=folder, max_steps=1, validation="none", lr=1e-30)
    first, second = (net.state_dict() for net in list(result.networks.values())[:2])
    assert torch.equal(first["conv1.weight"], second["conv1.weight"])
    assert not torch.equal(first["fc.weight"], second["fc.weight"])
    with pytest.raises(ValueError, match="equal initial weights"):
        train("dml", student=folder, epochs=1)


def test_every_network_of_a_team_fits_the_data():
    nets = [timm.create_model("cifar_resnet8", num_classes=classes) for classes in (10, 20)]
    with pytest.raises(
        ValueError, match="network 'peer1': the student has 20 classes, the data 10"
    ):
        distill(None, None, "digits", method=Peers(nets), epochs=1, **RUN)
    with pytest.raises(ValueError, match="temperature has no effect on a Method"):
        distill(None, None, "digits", method=Peers(nets[:1]), temperature=2.0, epochs=1, **RUN)
    with pytest.raises(
        ValueError, match="freeze='backbone' is for one student, this Method trains student, peer1"
    ):
        distill(None, None, "digits", method=peers(), freeze="backbone", epochs=1, **RUN)
    used = branches()
    distill(None, None, "digits", method=used, max_steps=1, validation="none", **RUN)
    with pytest.raises(ValueError, match="trained by an earlier run"):
        distill(None, None, "digits", method=used, max_steps=1, validation="none", **RUN)
