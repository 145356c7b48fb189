"""Peers and the callbacks that join them, on digits: alone they are alone, joined they agree with
the formulas."""

import copy
import json

import pytest
import timm
import torch

from kdtoolkit import distill, functional
from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.decaying import DecayingEnsemble
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.callbacks.diversity_measures import measure_batch, weight_distance
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.callbacks.kdcl import KDCL
from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.core.callback import Callback
from kdtoolkit.methods.peers import Peers
from kdtoolkit.types import Clock, Step

RUN = {
    "train_limit": 96,
    "batch_size": 32,
    "epochs": 1,
    "lr": 0.05,
    "progress": "off",
    "validation": "none",
}


def nets(count, name="cifar_resnet8", **options):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(timm.create_model(name, num_classes=10, **options))
    return made


class Keep(Callback):
    """Losses and weights after every step."""

    def __init__(self):
        self.losses, self.weights = [], []

    def on_step_end(self, run, step):
        self.losses.append({k: v.item() for k, v in step.losses.items()})
        self.weights.append(
            {n: copy.deepcopy(m.state_dict()) for n, m in run.method.networks().items()}
        )


def train(method, *callbacks, **options):
    kept = Keep()
    result = distill(
        None, None, "digits", method=method, callbacks=[*callbacks, kept], **{**RUN, **options}
    )
    return result, kept


def alone(net, **options):
    kept = Keep()
    distill(None, net, "digits", method="none", callbacks=[kept], **{**RUN, **options})
    return kept


@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.5}, {"optimizer": "adamw"}], ids=str)
def test_peers_that_nothing_joins_train_as_if_alone(options):
    """Dropout, clipping and optimizer included, to the last digit."""
    given = nets(2, drop_rate=0.2) if options else nets(2)
    singles = [alone(copy.deepcopy(net), **options) for net in given]
    _, kept = train(Peers(given), MutualKL(weight=0.0), DCLMerger(1, beta=0.0), **options)
    for name, loss, single in zip(("student", "peer1"), ("ce", "ce/peer1"), singles, strict=True):
        assert [row[loss] for row in kept.losses] == [row["ce"] for row in single.losses]
        for mine, its in zip(kept.weights, single.weights, strict=True):
            assert all(torch.equal(mine[name][key], its["student"][key]) for key in its["student"])


@pytest.mark.parametrize(
    "target, detach", [("pairwise", True), ("ensemble", True), ("pairwise", False)]
)
def test_mutual_kl_is_the_papers(target, detach):
    torch.manual_seed(0)
    logits = {f"n{k}": torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for k in range(3)}
    part = MutualKL(0.5, temperature=2.0, target=target, detach=detach)

    class Run:
        clock = Clock()

    loss = part.on_losses(Run, Step({}, logits), {})["mutual"]
    want = 0
    for k, z in logits.items():
        others = [t.detach() if detach else t for n, t in logits.items() if n != k]
        others = [torch.stack(others).mean(0)] if target == "ensemble" else others
        for t in others:
            q = torch.softmax(t / 2, 1)
            kl = (q * (q.log() - torch.log_softmax(z / 2, 1))).sum(1).mean()
            want = want + 0.5 * 4 * kl / len(others)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    mine, its = (
        torch.autograd.grad(v, list(logits.values()), retain_graph=True) for v in (loss, want)
    )
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if target == "pairwise" and detach:
        torch.testing.assert_close(
            loss, 0.5 * functional.mutual_loss(list(logits.values()), temperature=2.0).sum()
        )


def test_peers_teach_each_other_and_all_are_evaluated(tmp_path):
    result, kept = train(Peers(nets(2)), MutualKL(), output_dir=tmp_path / "run", epochs=2)
    single = alone(nets(1)[0], epochs=2)
    assert [row["ce"] for row in kept.losses] != [row["ce"] for row in single.losses]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert {r["network"] for r in rows if r["event"] == "eval"} == {"student", "peer1", "ensemble"}
    assert all(r["loss/mutual"] > 0 for r in rows if r["event"] == "epoch")
    assert result.metrics["top1"] > 0


@pytest.mark.parametrize("rule", functional.DCL_RULES)
def test_dcl_merges_every_t_steps(rule):
    given = nets(3)
    _, plain = train(Peers(copy.deepcopy(given)))
    _, kept = train(Peers(given), DCLMerger(2, rule=rule, beta=0.3))
    assert all(
        torch.equal(v, plain.weights[0]["peer1"][k]) for k, v in kept.weights[0]["peer1"].items()
    )
    parameters = [name for name, _ in given[0].named_parameters()]
    before = [{k: w[k] for k in parameters} for w in plain.weights[1].values()]
    merged = functional.dcl_merge(before, beta=0.3, rule=rule)
    for name, own in zip(("student", "peer1", "peer2"), merged, strict=True):
        after = kept.weights[1][name]
        for key in after:  # statistics of BatchNorm are each network's own
            torch.testing.assert_close(
                after[key], own.get(key, plain.weights[1][name][key]), rtol=0, atol=0
            )


def test_dcl_logs_diversity(tmp_path):
    train(
        Peers(nets(2)),
        DCLMerger(1, unit="epochs"),
        Diversity(),
        output_dir=tmp_path / "run",
        epochs=2,
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [r for r in map(json.loads, lines) if r["event"] == "diversity"]
    assert [r["epoch"] for r in rows] == [1, 2] and all(r["weights"] > 0 for r in rows)
    a, b = nets(2)
    assert weight_distance([a, a]) == 0 and weight_distance([a, b]) > 0.5
    assert (
        measure_batch([torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]], torch.arange(4))["disagreement"]
        == 50
    )


class Rows(Callback):
    """What each network saw in a step, and its loss from the formula."""

    def __init__(self, count):
        self.count, self.rows, self.worst = count, [], 0.0

    def on_losses(self, run, step, batch):
        self.rows.append([batch["index"][k :: self.count].tolist() for k in range(self.count)])
        for k, (name, z) in enumerate(step.logits.items()):
            labels = batch["y"][k :: self.count]
            assert len(z) == len(labels) == run.config.batch_size // run.config.grad_accum
            ours = step.losses["ce" if k == 0 else f"ce/{name}"]
            self.worst = max(self.worst, abs(ours.item() - functional.ce(z, labels).item()))


@pytest.mark.parametrize("options", [{}, {"grad_accum": 2}], ids=str)
def test_every_network_has_batches_of_its_own(options):
    seen = Rows(3)
    given = [nets(1)[0] for _ in range(3)]  # equal first weights
    result, kept = train(
        Peers(given, batches="own"), DCLMerger(2), Diversity(), seen, epochs=2, **options
    )
    assert seen.worst == 0.0
    steps = len(seen.rows) // 2
    for epoch in (seen.rows[:steps], seen.rows[steps:]):
        orders = [tuple(row for step in epoch for row in step[k]) for k in range(3)]
        assert all(sorted(order) == sorted(set(orders[0])) for order in orders)  # all 96 rows
        assert len(orders[0]) == 96 and len(set(orders)) == 3
    assert seen.rows[:steps] != seen.rows[steps:]
    last = kept.weights[-1]
    assert not torch.equal(last["student"]["fc.weight"], last["peer1"]["fc.weight"])
    rows = [row for row in result.history if row["event"] == "diversity"]
    assert len(rows) == 2 and all("disagreement" not in row and row["weights"] > 0 for row in rows)
    assert any("3 batches, one for each network" in note for note in result.plan["notes"])


def test_batches_of_its_own_are_those_of_a_network_trained_alone_on_them():
    """Network 1 is trained again by hand, on the images that it saw."""

    class Images(Callback):
        def __init__(self):
            self.seen = []

        def on_losses(self, run, step, batch):
            self.seen.append((batch["x"][1::2].clone(), batch["y"][1::2].clone()))

    images, given = Images(), nets(2)
    own = copy.deepcopy(given[1]).train()
    method = Peers(given, batches="own")
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    _, kept = train(method, images, optimizer="sgd", scheduler="constant", **plain)
    normalise = method.preprocess["peer1"]
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, weight_decay=0.0)
    for (x, y), row in zip(images.seen, kept.losses, strict=True):
        loss = functional.ce(own(normalise(x)), y)
        torch.testing.assert_close(loss.item(), row["ce/peer1"], rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "callback",
    [MutualKL(), KDCL(rule="mean"), EMATeacher(), EMATeacher(learn_from="all"), DecayingEnsemble()],
    ids=lambda c: type(c).__name__,
)
def test_losses_between_networks_need_the_same_images(callback):
    given = copy.deepcopy(callback)
    with pytest.raises(ValueError, match="on the same images.*pass batches='shared'"):
        train(Peers(nets(2), batches="own"), given)


def test_what_compares_no_networks_goes_with_own_batches():
    own = EMATeacher(learn_from="own")
    result, kept = train(Peers(nets(2), batches="own"), own, MutualKL(0.0))
    assert {"ema", "ema/peer1"} <= set(result.networks)
    assert len(kept.losses) == 3 and len({row["ce"] for row in kept.losses}) == 3


def test_two_architectures_of_different_sizes():
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=48,
        patch_size=8,
        depth=2,
        embed_dim=32,
        num_heads=2,
    )
    method = Peers([nets(1)[0], vit], image=(32, 32), views=True)
    assert method.num_views == 2 and method.preprocess["peer1"].size == (48, 48)
    x = torch.rand(4, 2, 3, 32, 32)
    batch = {"x": x[:, 0], "views": x, "y": torch.tensor([0, 1, 2, 3])}
    step = method.eval()(batch, Clock())
    assert torch.equal(step.logits["peer1"], method.logits("peer1", x[:, 1]))
    assert set(step.losses) == {"ce", "ce/peer1"}
    with pytest.raises(
        ValueError,
        match="DCLMerger merges networks of one architecture; peer1 has other parameters",
    ):
        train(Peers([nets(1)[0], copy.deepcopy(vit)], image=(32, 32)), DCLMerger())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Peers([]), "at least one network"),
        (lambda: Peers(nets(2), batches="mine"), "batches is 'mine'; allowed: 'shared', 'own'"),
        (lambda: Peers(nets(2), views=True, batches="own"), "views=True has no effect"),
        (lambda: Peers(nets(1) * 2), "network 1 of Peers has parameters in common"),
        (lambda: MutualKL(target="all"), "target is 'all'; allowed: 'pairwise', 'ensemble'"),
        (lambda: MutualKL(temperature=0), "temperature is 0; allowed: a finite number above 0"),
        (lambda: MutualKL(-1.0), "weight is -1.0; allowed"),
        (lambda: DCLMerger(0), "every is 0; allowed: a whole number from 1"),
        (lambda: DCLMerger(unit="days"), "unit is 'days'"),
        (lambda: DCLMerger(beta=2), "beta is 2"),
        (lambda: DCLMerger(rule="median"), "rule is 'median'"),
        (
            lambda: train(Peers(nets(1)), MutualKL()),
            "MutualKL needs two networks or more, this run trains 1",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()
