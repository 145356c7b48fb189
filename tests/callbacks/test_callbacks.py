"""EMA teachers, decaying ensembles, KDCL, DCL, Diversity, and strategies made of them."""

import copy
import dataclasses
import inspect
import itertools
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import paper_totals
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

import kdtoolkit.data as room
from kdtoolkit import distill, functional
from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.decaying import DecayingEnsemble
from kdtoolkit.callbacks.diversity import CollapseWarning, Diversity
from kdtoolkit.callbacks.diversity_measures import measure_batch
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.callbacks.kdcl import KDCL
from kdtoolkit.callbacks.mutual import MutualKL
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.registries import METHODS
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.factory import create_method
from kdtoolkit.methods.peers import Peers
from kdtoolkit.schedules import RampUpAsCoded, SigmoidRampUp
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.types import Clock, Step
from kdtoolkit.utils.signals import Interrupted
from kdtoolkit.utils.state import preserve_accelerate_state, preserve_random_state

RUN = {"batch_size": 32, "epochs": 1, "lr": 0.05, "progress": "off", "num_workers": 0}


@pytest.fixture(scope="session")
def digits() -> room.Data:
    """96 images to train on, none to evaluate."""
    return dataclasses.replace(room.load("digits", train_limit=96, validation="none"), test=None)


@pytest.fixture(scope="session")
def valued() -> room.Data:
    """With 64 images of validation."""
    return dataclasses.replace(room.load("digits", train_limit=96, validation=64), test=None)


def nets(count, name="cifar_resnet8", **options):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(timm.create_model(name, num_classes=10, **options))
    return made


class Keep(Callback):
    """Batches, and weights after every step."""

    def __init__(self):
        self.batches, self.weights, self.first = [], [], None

    def on_fit_start(self, run):
        kept = next((c for c in run.callbacks if isinstance(c, EMATeacher)), None)
        self.first = None if kept is None else copy.deepcopy(kept.copy.state_dict())

    def on_losses(self, run, step, batch):
        self.batches.append({k: v.clone() for k, v in batch.items()})

    def on_step_end(self, run, step):
        self.weights.append(copy.deepcopy(run.method.state_dict()))


class Ask(Callback):
    """Has the teacher run, and learns nothing."""

    order = 30

    def on_losses(self, run, step, batch):
        next(c for c in run.callbacks if isinstance(c, EMATeacher)).logits(run, batch)


def train(data, method, *callbacks, **options):
    kept = Keep()
    result = distill(
        None, None, data, method=method, callbacks=[*callbacks, kept], **{**RUN, **options}
    )
    return result, kept


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def bench(method, *callbacks, **clock):
    """As much of a run as callbacks read, and its callbacks started."""
    run = SimpleNamespace(
        method=method,
        callbacks=list(callbacks),
        clock=Clock(**{"total_steps": 10, **clock}),
        epoch_start=0,
        config=SimpleNamespace(lr=0.1, weight_decay=0.0, seed=0, grad_accum=1, compile=False),
        accelerator=SimpleNamespace(
            autocast=nullcontext, sync_gradients=True, device=torch.device("cpu")
        ),
    )
    for callback in callbacks:
        callback.on_fit_start(run)
    return run


def random(count=3, batch=6, classes=5):
    torch.manual_seed(1)
    return [
        {f"n{k}": torch.randn(batch, classes, dtype=torch.float64) for k in range(count)}
        for _ in range(2)
    ]


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def answering(part, teachers):
    part.logits = lambda run, batch: teachers
    return part


# ----------------------------------------------------------------------- the losses are the papers'
def test_pcl_and_dkel_are_the_whole_losses():
    z, m = random()
    ensemble, w = torch.randn(6, 5, dtype=torch.float64), 0.3
    run = SimpleNamespace(clock=Clock(epoch=2), method=SimpleNamespace(networks=lambda: z))
    step, students, teachers = Step({}, z), list(z.values()), list(m.values())
    rest = functional.ce(ensemble, LABELS) + paper_totals.ce_each(students, LABELS).sum()
    rest = rest + w * functional.kd_ensemble(students, ensemble).sum()
    ema = answering(EMATeacher(w), m)
    pcl = paper_totals.pcl(students, ensemble, teachers, LABELS, weight=w)
    torch.testing.assert_close(rest + ema.on_losses(run, step, {})["ema"], pcl, rtol=1e-12, atol=0)
    for epoch in (0, 2, 12):
        run.clock.epoch = epoch
        part = DecayingEnsemble(w)
        part.teacher = ema
        g = part.ensemble_share(run.clock)
        assert g == {0: 1.0, 2: 0.36787944117144233, 12: 0.0}[epoch]
        early = functional.kd_mean_of_other_teachers(students, teachers, temperature=3.0)
        late = functional.kd_other_teachers(students, teachers, temperature=3.0)
        for combine, share in (("add", 1.0), ("mix", 1 - g)):
            part.combine = combine
            wanted = w * (g * early + share * late).sum()
            found = part.on_losses(run, step, {})["decaying"]
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        released = paper_totals.dkel(
            students, ensemble, teachers, LABELS, weight=w, ensemble_weight=g
        )
        torch.testing.assert_close(rest + found, released, rtol=1e-12, atol=0)
    part.teacher = None  # their own logits
    alone = paper_totals.dkel(students, ensemble, students, LABELS, weight=w, ensemble_weight=0.0)
    torch.testing.assert_close(
        rest + part.on_losses(run, step, {})["decaying"], alone, rtol=1e-12, atol=0
    )


def test_shares_of_the_decaying_ensemble():
    half, run = (
        Clock(epoch=5, steps_per_epoch=2, total_steps=20),
        Clock(steps_per_epoch=2, total_steps=20),
    )
    for decay in ("cosine", "linear"):
        part = DecayingEnsemble(decay=decay)
        assert part.ensemble_share(run) == 1.0 and part.ensemble_share(half) == pytest.approx(0.5)
        assert DecayingEnsemble(decay=decay, length=5).ensemble_share(half) == 0.0
    assert (
        DecayingEnsemble(rate=0.0).ensemble_share(half) == 1.0
        and DecayingEnsemble(rate=1.0, cut=0.0).ensemble_share(half) > 0
    )


@pytest.mark.parametrize("learn_from", ["own", "all", "others"])
@pytest.mark.parametrize("loss", ["kd", "mse", "kl"])
def test_every_loss_from_every_teacher(learn_from, loss):
    z, m = random()
    part = answering(EMATeacher(0.5, learn_from=learn_from, loss=loss, temperature=2.0), m)
    found = part.on_losses(SimpleNamespace(clock=Clock()), Step({}, z), {})["ema"]
    one = {"kd": lambda a, b: functional.kd(a, b, temperature=2.0)}.get(loss) or (
        lambda a, b: functional.consistency(a, b, kind=loss)
    )
    want = 0
    for i, own in enumerate(z.values()):
        teachers = [
            t
            for j, t in enumerate(m.values())
            if {"own": j == i, "all": True, "others": j != i}[learn_from]
        ]
        want = want + 0.5 * sum(one(own, t) for t in teachers) / len(teachers)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_mean_teacher_is_the_whole_loss_and_its_teacher_sees_the_other_view():
    method = create_method(
        "mean_teacher", Taps(nets(1)[0], None, 16), losses={"ce": 1.0, "consistency": 7.0}
    )
    (ema,) = method.callbacks
    run = bench(method, ema)
    torch.manual_seed(3)
    views, labels = torch.rand(6, 2, 3, 16, 16), torch.tensor([0, -1, 2, -1, 4, 5])
    batch = {"x": views[:, 0], "views": views, "y": labels}
    step = method(batch, run.clock)
    total = sum(step.losses.values()) + ema.on_losses(run, step, batch)["consistency"]
    other = nets(1)[0].train()(method.preprocess["student"](views[:, 1]))
    want = paper_totals.mean_teacher(step.logits["student"], other, labels, weight=7.0)
    torch.testing.assert_close(total, want)
    assert method.uses_unlabelled and ema.export_candidates() == (
        ["ema"],
        "the EMA teacher is what mean teacher uses for inference",
    )


@pytest.mark.parametrize("rule", functional.KDCL_RULES)
def test_kdcl_is_the_whole_loss(rule):
    z, _ = random()
    students = list(z.values())
    part = KDCL(0.7, rule=rule)
    part.mixture = weights = torch.tensor([0.5, 0.7, -0.2]) if rule == "general" else None
    run = SimpleNamespace(clock=Clock(), method=SimpleNamespace(networks=lambda: z))
    target = functional.kdcl_targets(students, LABELS, rule=rule, weights=weights)
    total = (
        paper_totals.ce_each(students, LABELS).sum()
        + part.on_losses(run, Step({}, z), {"y": LABELS})["kdcl"]
    )
    torch.testing.assert_close(total, paper_totals.kdcl(students, target, LABELS, weight=0.7))


def test_forms_of_mutual_learning_are_those_of_the_benchmarks():
    z, _ = random()
    for v in z.values():
        v.requires_grad_()
    students = list(z.values())
    hard = paper_totals.ce_each(students, LABELS).sum()
    okddip = {"form": "eps", "detach": False, "temperature": 3.0}
    smooth = paper_totals.ce_each(students, LABELS, label_smoothing=0.1).sum()
    for options, rest, want in (
        ({}, hard, paper_totals.dml(students, LABELS)),
        ({"form": "tf"}, smooth, paper_totals.dml_tf(students, LABELS)),
        (okddip, hard, paper_totals.dml_okddip(students, LABELS)),
        (
            okddip | {"target": "ensemble"},
            hard,
            paper_totals.dml_okddip(students, LABELS, ensemble_first=True),
        ),
        (
            {"form": "soft-ce", "target": "ensemble", "temperature": 2.0},
            hard,
            paper_totals.cl_paper(students, LABELS) * 2,
        ),
    ):
        total = (
            rest
            + MutualKL(1.0, **options).on_losses(SimpleNamespace(clock=Clock()), Step({}, z), {})[
                "mutual"
            ]
        )
        torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
        mine, its = (
            torch.autograd.grad(loss, students, retain_graph=True) for loss in (total, want)
        )
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------- the average
@pytest.mark.parametrize("count", ["constant", "from 0", "from 1"])
def test_ema_is_the_slow_loop(count, digits):
    ema = EMATeacher(1.0, decay=0.6, count=count)
    _, kept = train(digits, Peers(nets(2)), ema, epochs=2)
    names = [n for n, _ in ema.copy.named_parameters()]
    average = {k: kept.first[k].double() for k in names}
    for n, now in enumerate(kept.weights):
        alpha = {
            "constant": 0.6,
            "from 0": min(1 - 1 / (n + 1), 0.6),
            "from 1": min(1 - 1 / (n + 2), 0.6),
        }[count]
        average = {k: alpha * average[k] + (1 - alpha) * now[k].double() for k in names}
        if n == 0 and count == "from 0":
            assert all(torch.equal(average[k], now[k].double()) for k in names)
    state = ema.copy.state_dict()
    for k in names:
        torch.testing.assert_close(state[k].double(), average[k], rtol=1e-5, atol=1e-6)
    mean, counter = (f"peers.student.{n}" for n in _buffers(ema.copy.peers["student"]))
    assert (
        not torch.equal(state[mean], kept.weights[-1][mean]) and state[counter] == 6
    )  # statistics of its own
    assert list(ema.networks()) == ["ema", "ema/peer1"] and ema.export_candidates()[0] == [
        "ema",
        "ema/peer1",
    ]
    assert list(ema.predict(torch.rand(2, 3, 16, 16))) == ["ema", "ema/peer1"] and ema.copy.training
    assert not any(p is q for p in ema.copy.parameters() for q in ema.networks())


def _buffers(net):
    names = [n for n, _ in net.named_buffers()]
    return next(n for n in names if "running_mean" in n), next(
        n for n in names if "num_batches" in n
    )


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 1.0, "mode": "eval"}], ids=str)
def test_statistics_of_a_teacher_that_is_not_run_or_in_eval_mode_are_the_students(options, digits):
    ema = EMATeacher(**options)
    _, kept = train(digits, Peers(nets(2)), ema)
    for name, value in ema.copy.named_buffers():
        assert torch.equal(value, kept.weights[-1][name]), name


def test_weight_0_is_exactly_off(digits):
    _, plain = train(digits, Peers(nets(2, drop_rate=0.2)))
    parts = EMATeacher(0.0), DecayingEnsemble(0.0), MutualKL(0.0), KDCL(0.0), DCLMerger(1, beta=0.0)
    _, kept = train(digits, Peers(nets(2, drop_rate=0.2)), *parts)
    assert all(same(a, b) for a, b in zip(plain.weights, kept.weights, strict=True))
    ema = EMATeacher(0.0)
    _, asked = train(digits, Peers(nets(2, drop_rate=0.2)), ema, Ask())  # its dropout draws apart
    assert (
        all(same(a, b) for a, b in zip(plain.weights, asked.weights, strict=True))
        and ema.updates == 3
    )


def test_accumulated_batches_make_one_update(digits):
    ema = EMATeacher(1.0)
    train(digits, Peers(nets(2)), ema, batch_size=48, grad_accum=2, epochs=2)
    assert ema.updates == 4


def test_first_steps_of_a_teacher_of_its_own(digits):
    """Two SGD steps by hand on the first batches of the run, which itself is unchanged."""
    ema = EMATeacher(0.0, init_steps=2, init_lr=0.3)
    _, kept = train(digits, Peers(nets(2)), ema, channels_last=False)
    hand = Peers(nets(2)).train()
    for batch in kept.batches[:2]:
        loss = sum(functional.ce(z, batch["y"]) for z in hand.train_logits(batch).values()) / 2
        loss.backward()
        with torch.no_grad():
            for p in hand.parameters():
                p -= 0.3 * (p.grad + 5e-4 * p)
        hand.zero_grad()
    for k, v in hand.state_dict().items():
        torch.testing.assert_close(kept.first[k], v, rtol=1e-5, atol=1e-6)
    _, plain = train(digits, Peers(nets(2)), channels_last=False)
    assert all(same(a, b) for a, b in zip(plain.weights, kept.weights, strict=True))
    _, own = train(digits, Peers(nets(2)), EMATeacher(0.0, init="independent"))
    conv = next(k for k in own.first if k.endswith("weight"))
    assert not torch.allclose(own.first[conv], Peers(nets(2)).state_dict()[conv])


def test_the_copy_of_branches_is_a_team_of_its_own():
    method = create_method("pcl", Taps(nets(1)[0], None, 16), branches=3)
    ema, _ = method.callbacks
    run = bench(method.train(), ema)
    views = torch.rand(4, 3, 3, 16, 16)
    batch = {"x": views[:, 0], "views": views, "y": torch.arange(4)}
    for name, z in ema.logits(run, batch).items():
        torch.testing.assert_close(z, method.train_logits(batch)[name], msg=name)
    assert len(list(ema.copy.parameters())) == len(list(method.parameters()))  # one trunk
    before, run.clock.step = method.train_logits(batch), 1
    for p in ema.copy.parameters():
        p.zero_()
    assert all(not z.any() for z in ema.logits(run, batch).values())
    assert all(torch.equal(z, before[name]) for name, z in method.train_logits(batch).items())
    assert list(ema.predict(views[:, 0])) == ["ema", "ema/branch1", "ema/branch2", "ema/ensemble"]


# -------------------------------------------------------------------------------------------- order
def test_the_order_in_which_callbacks_are_listed_does_not_matter(digits):
    made = []
    for order in itertools.permutations(range(4)):
        parts = [DCLMerger(1, beta=0.3), EMATeacher(0.5), DecayingEnsemble(0.5), MutualKL(0.5)]
        method = Peers(nets(2))
        with preserve_random_state(), preserve_accelerate_state(None):
            accelerator = Accelerator(
                cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
            )
            run = Trainer(
                method,
                digits,
                TrainerConfig(1, batch_size=48, monitor=None),
                accelerator,
                [parts[i] for i in order],
            )
            run.fit()
        made.append(
            {
                **method.state_dict(),
                **{f"ema {k}": v for k, v in parts[1].copy.state_dict().items()},
            }
        )
    assert len(made) == 24 and all(same(made[0], other) for other in made[1:])
    assert [
        c.order for c in (DCLMerger, EMATeacher, DecayingEnsemble, MutualKL, KDCL, Diversity)
    ] == [
        10,
        20,
        30,
        40,
        45,
        100,
    ]


# ------------------------------------------------------------------------------------------- resume
class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, run, step):
        if run.clock.step == self.step:
            run.stop_signal.receive(signal.SIGTERM)


def no_clock(rows):
    noise = ("images_per_s", "latency_ms", "teacher_latency_ms", "compression")
    return [{k: v for k, v in r.items() if k not in noise} for r in rows]


SETS = {
    "ema": lambda: [EMATeacher(1.0, decay=0.9, init_steps=1), DecayingEnsemble(0.5), Diversity()],
    "dcl": lambda: [
        EMATeacher(1.0, count="from 1", learn_from="own", mode="eval"),
        MutualKL(1.0, form="tf"),
        DCLMerger(2, statistics="recalibrated", momentum="merged", until=0.8),
        Diversity(after=0),
        KDCL(1.0, rule="general"),
    ],
}


@pytest.mark.parametrize("which", SETS)
def test_interrupted_and_resumed_equals_uninterrupted(which, valued, tmp_path):
    def run(*more, **options):
        parts = SETS[which]()
        given = {
            "epochs": 2,
            "output_dir": tmp_path / "run",
            "log_every": 2,
            "report_to": "none",
            **options,
        }
        return train(valued, Peers(nets(2, drop_rate=0.2)), *parts, *more, **given)[0], parts[0]

    straight, whole = run(output_dir=None)
    stop = {"ema": 2, "dcl": 4}[which]  # of 3 steps an epoch
    with pytest.raises(Interrupted, match=f"stopped at step {stop}"):
        run(StopAt(stop))
    resumed, part = run(resume="auto")
    assert same(straight.student.state_dict(), resumed.student.state_dict())
    assert no_clock(straight.history) == no_clock(resumed.history)
    for name, net in whole.networks().items():
        assert same(net.state_dict(), part.networks()[name].state_dict())


# ---------------------------------------------------------------------------------------------- dcl
def test_merged_statistics_and_momentum(digits):
    """An exchange by hand, of what an optimizer has kept after two steps."""

    class Check(Callback):
        order = 5

        def on_step_end(self, run, step):
            self.before = [_kept(net, run.optimizer) for net in run.method.networks().values()]

    class After(Callback):
        def on_step_end(self, run, step):
            self.after = [_kept(net, run.optimizer) for net in run.method.networks().values()]

    def _kept(net, optimizer):
        kept = {n: b.clone() for n, b in net.named_buffers()}
        state = optimizer.optimizer.state
        return kept | {
            f"{n} {k}": v.clone()
            for n, p in net.named_parameters()
            for k, v in state.get(p, {}).items()
            if isinstance(v, torch.Tensor)
        }

    for optimizer in ("sgd", "adamw"):
        check, after = Check(), After()
        merger = DCLMerger(2, beta=0.4, statistics="merged", momentum="merged")
        train(
            digits,
            Peers(nets(3)),
            check,
            after,
            merger,
            max_steps=2,
            epochs=None,
            optimizer=optimizer,
        )
        for key, value in check.before[0].items():
            mean = sum(b[key].double() for b in check.before) / 3
            counter = key.endswith(("num_batches_tracked", "step"))
            for old, new in zip(check.before, after.after, strict=True):
                want = (
                    old[key] if counter else (0.4 * mean + 0.6 * old[key].double()).to(value.dtype)
                )
                torch.testing.assert_close(new[key], want)
        assert any("exp_avg" in k or "momentum_buffer" in k for k in check.before[0])
    after = After()
    train(digits, Peers(nets(2)), after, DCLMerger(2, momentum="reset"), max_steps=2, epochs=None)
    assert not any("momentum_buffer" in k for k in after.after[0])


def test_recalibrated_statistics_are_those_of_the_weights(digits):
    class Look(Callback):
        def on_epoch_start(self, run):
            self.run = run

    look = Look()
    merger = DCLMerger(1, beta=0.5, statistics="recalibrated")
    _, kept = train(digits, Peers(nets(2)), merger, look)
    _, own = train(digits, Peers(nets(2)), DCLMerger(1, beta=0.5))
    parameters = [n for n, _ in look.run.method.named_parameters()]
    assert all(torch.equal(kept.weights[-1][n], own.weights[-1][n]) for n in parameters)
    found = kept.weights[-1]
    mean, counter = (f"peers.student.{n}" for n in _buffers(look.run.method.peers["student"]))
    assert found[counter] == 3 and not torch.equal(found[mean], own.weights[-1][mean])
    net = look.run.method.peers[
        "student"
    ].train()  # the first BatchNorm sees the first convolution's outputs
    images = torch.cat([b["x"] for b in kept.batches])
    want = net.conv1(look.run.method.preprocess["student"](images)).mean((0, 2, 3))
    torch.testing.assert_close(
        found[mean], want, rtol=0.05, atol=0.02
    )  # other crops of the same 96 images


def test_exchanges_between_two_shares_of_the_run(digits):
    _, plain = train(digits, Peers(nets(2)), epochs=2)
    _, kept = train(digits, Peers(nets(2)), DCLMerger(1, start=0.4, until=0.7), epochs=2)
    assert [same(a, b) for a, b in zip(plain.weights, kept.weights, strict=True)][:3] == [
        True,
        True,
        False,
    ]

    class Count(DCLMerger):
        steps = ()

        def merge(self, nets):
            self.steps = (*self.steps, self.run.clock.step)

        def on_fit_start(self, run):
            self.run = run

    for options, want in (({"start": 0.4, "until": 0.7}, (3, 4)), ({"until": 0.5}, (1, 2, 3))):
        merger = Count(1, **options)
        train(digits, Peers(nets(2)), merger, epochs=2)
        assert merger.steps == want


# ---------------------------------------------------------------------------------------- diversity
def identical():
    method = Peers(nets(2))
    method.peers["peer1"].load_state_dict(method.peers["student"].state_dict())
    return method


def test_identical_networks_are_noticed_and_peers_are_not(digits):
    options = {"epochs": 3, "batch_size": 48}
    with pytest.warns(CollapseWarning, match="epoch 2: the peers have collapsed") as found:
        train(digits, identical(), Diversity(after=0), **options)
    assert len(found) == 1
    result, _ = train(
        digits, Peers(nets(2)), MutualKL(1.0), EMATeacher(1.0), Diversity(after=0), **options
    )
    rows = [r for r in result.history if r["event"] == "diversity"]
    names = {"weights", "disagreement", "knowledge"}
    assert len(rows) == 3 and all({*names, *(f"ema/{n}" for n in names)} <= r.keys() for r in rows)
    train(digits, identical(), Diversity(), **options)  # nothing is judged before 200 batches


def test_an_average_that_equals_the_other_network_is_noticed(digits):
    """As in a collapse of PCL: the averages of the others say what each network says."""
    with pytest.warns(CollapseWarning, match="ema/knowledge"):
        train(digits, identical(), EMATeacher(1.0, count="from 0"), Diversity(after=0), epochs=2)


def test_numbers_of_one_batch():
    z = [torch.eye(4) * 5, torch.eye(4)[[1, 0, 2, 3]] * 5]
    row = measure_batch(z, torch.tensor([0, 1, 2, -1]))
    assert row["disagreement"] == 50 and row["errors"] == pytest.approx(100 / 3)
    kl = [functional.kd(a, b, temperature=1.0) for a, b in (z, z[::-1])]
    torch.testing.assert_close(row["kl"], sum(kl) / 2)
    torch.testing.assert_close(
        row["ce"], sum(functional.ce(a[:3], torch.tensor([0, 1, 2])) for a in z) / 2
    )


# --------------------------------------------------------------------------------------- strategies
@pytest.mark.parametrize(
    "name, options, terms, product",
    [
        ("dml", {"peers": 3, "form": "eps"}, {"mutual", "ce", "ce/peer1", "ce/peer2"}, "student"),
        (
            "dcl",
            {"every": 2, "statistics": "merged", "moments": "reset"},
            {"ce", "ce/peer1"},
            "student",
        ),
        ("kdcl", {"rule": "general"}, {"kdcl", "ce", "ce/peer1"}, "student"),
        ("mean_teacher", {"mixed": 0.25}, {"ce", "consistency"}, "ema"),
        (
            "dkel",
            {"branches": 2},
            {"ce", "ce/branch1", "ce/ensemble", "ensemble", "decaying"},
            "ema",
        ),
    ],
)
def test_strategies_by_name(name, options, terms, product, valued):
    result = distill(None, "cifar_resnet8", valued, method=name, **{**RUN, "epochs": 2, **options})
    row = next(r for r in result.history if r["event"] == "epoch")
    assert {k[5:] for k in row if k.startswith("loss/")} == terms
    evaluated = {r["network"] for r in result.history if r["event"] == "eval"}
    assert product in evaluated and "student" in evaluated
    assert {"dkel": {"ensemble", "ema/ensemble", "ema/branch1"}}.get(name, set()) <= evaluated


def test_mean_teacher_of_images_without_labels():
    options = {**RUN, "train_limit": 96, "validation": 64, "labelled": 16, "mixed": 0.25}
    result = distill(None, "cifar_resnet8", "digits", method="mean_teacher", **options)
    (row,) = (r for r in result.history if r["event"] == "epoch")
    assert (
        0 < row["loss/ce"] < 0.25 * 4 and result.metrics["exported"] == "ema"
    )  # 8 of 32 images count


def test_no_option_has_the_name_of_an_argument_of_distill():
    taken = set(inspect.signature(distill).parameters) - {"temperature"}  # which is passed on
    for name in METHODS.names():
        assert not taken & set(getattr(METHODS[name], "options", ())), name


def test_rampups_of_dkel():
    def weights(**options):
        method = create_method("dkel", Taps(nets(1)[0], None, 16), branches=2, **options)
        return method.weights["ensemble"], method.callbacks[1].weight

    assert weights() == (SigmoidRampUp(0.1), SigmoidRampUp(0.1))
    assert weights(rampup_epochs=7) == (SigmoidRampUp(0.1, 7),) * 2
    assert weights(rampup="released") == (RampUpAsCoded(0.1),) * 2
    assert weights(rampup="released", rampup_epochs=9) == (RampUpAsCoded(0.1, 9),) * 2
    assert weights(protocol="released") == (RampUpAsCoded(0.1),) * 2
    assert weights(protocol="released", rampup="intended") == (SigmoidRampUp(0.1),) * 2


@pytest.mark.parametrize(
    "options, steps, lr, count, combine",
    [
        ({}, 1, 0.01, None, "add"),
        ({"protocol": "released"}, 1, None, 0, "mix"),
        ({"protocol": "released", "combine": "add", "init_lr": 0.3}, 1, 0.3, 0, "add"),
        ({"init_steps": 5, "count": "from 1", "combine": "mix"}, 5, 0.01, 1, "mix"),
        ({"parts": "decoupled"}, 1, 0.01, None, None),
        ({"parts": "decaying"}, 0, 0.01, None, "add"),
        ({"parts": "none"}, 0, 0.01, None, None),
    ],
)
def test_protocols_and_parts_of_dkel(options, steps, lr, count, combine):
    method = create_method("dkel", Taps(nets(1)[0], None, 16), branches=2, **options)
    teacher, *rest = method.callbacks
    assert (teacher.init_steps, teacher.init_lr, teacher.first_count) == (steps, lr, count)
    ensembles = [part for part in rest if isinstance(part, DecayingEnsemble)]
    assert [part.combine for part in ensembles] == ([combine] if combine else [])
    # the loss is there once, under one name, whatever it consists of
    rows = [row for part in method.callbacks for row in part.plan_rows()]
    assert [row["loss"] for row in rows] == ["decaying"]


def test_peers_of_a_list_and_other_architectures(digits):
    method = create_method(
        "kdcl", Taps(nets(1)[0], None, 16), peers=[nets(1, "cifar_resnet14")[0]], image=(16, 16)
    )
    depths = [
        sum(isinstance(m, torch.nn.Conv2d) for m in net.modules())
        for net in method.networks().values()
    ]
    assert method.num_views == 2 and depths[1] > depths[0]
    assert method.export_candidates()[0] == ["student"]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda d: EMATeacher(count="from 2"),
            "count is 'from 2'; allowed: 'constant', 'from 0', 'from 1'",
        ),
        (lambda d: EMATeacher(loss="l1"), "loss is 'l1'; allowed: 'kd', 'mse', 'kl'"),
        (lambda d: EMATeacher(learn_from="peers"), "learn_from is 'peers'"),
        (lambda d: EMATeacher(mode="frozen"), "mode is 'frozen'"),
        (lambda d: EMATeacher(init="random"), "init is 'random'"),
        (lambda d: EMATeacher(decay=1.5), "decay is 1.5"),
        (lambda d: EMATeacher(-1.0), "weight is -1.0; allowed: a finite number from 0"),
        (lambda d: EMATeacher(temperature=0), "temperature is 0"),
        (lambda d: EMATeacher(init_steps=-1), "init_steps is -1"),
        (
            lambda d: train(d, Peers(nets(1)), EMATeacher()),
            "needs two networks or more, this run trains 1",
        ),
        (
            lambda d: train(d, Peers(nets(2)), EMATeacher(view=1)),
            "view is 1: views are counted from 0, the method makes 1",
        ),
        (
            lambda d: train(d, Peers(nets(2)), EMATeacher(init_steps=9)),
            "init_steps=9, an epoch has 3 batches",
        ),
        (
            lambda d: DecayingEnsemble(decay="step"),
            "decay is 'step'; allowed: 'exponential', 'cosine', 'linear'",
        ),
        (lambda d: DecayingEnsemble(rate=-1), "rate is -1"),
        (
            lambda d: DecayingEnsemble(length=3),
            r"length is 3; allowed: a number above 0 \(epochs\), with decay='cosine' or 'linear'",
        ),
        (lambda d: DecayingEnsemble(temperature=0), "temperature is 0"),
        (lambda d: DecayingEnsemble(-1.0), "weight is -1.0; allowed: a finite number from 0"),
        (
            lambda d: train(d, Peers(nets(1)), DecayingEnsemble()),
            "DecayingEnsemble needs two networks or more",
        ),
        (lambda d: KDCL(rule="best"), "rule is 'best'; allowed: 'naive'"),
        (lambda d: KDCL(temperature=0), "temperature is 0"),
        (lambda d: KDCL(-1.0), "weight is -1.0; allowed: a finite number from 0"),
        (lambda d: train(d, Peers(nets(1)), KDCL()), "KDCL needs two networks or more"),
        (
            lambda d: train(d, Peers(nets(2)), KDCL(rule="general")),
            "there is none: set validation=0.1",
        ),
        (lambda d: MutualKL(form="js"), "form is 'js'; allowed: 'kl', 'eps', 'soft-ce', 'tf'"),
        (lambda d: MutualKL(form="tf", temperature=2.0), "form='tf' has temperature=1.0"),
        (
            lambda d: DCLMerger(statistics="mean"),
            "statistics is 'mean'; allowed: 'own', 'merged', 'recalibrated'",
        ),
        (lambda d: DCLMerger(momentum="none"), "momentum is 'none'"),
        (
            lambda d: DCLMerger(start=0.6, until=0.5),
            "start is 0.6 and until 0.5; allowed: shares of the run",
        ),
        (lambda d: Diversity(0), "every is 0"),
        (lambda d: Diversity(after=-1), "after is -1"),
        (
            lambda d: train(d, Peers(nets(1)), Diversity()),
            "Diversity compares two networks or more",
        ),
        (
            lambda d: create_method("dml", Taps(nets(1)[0], None, 16), peers=1),
            "peers is 1; allowed: a whole number of networks from 2",
        ),
        (
            lambda d: create_method("dkel", Taps(nets(1)[0], None, 16), rampup="none"),
            "rampup is 'none'",
        ),
    ],
)
def test_messages(make, message, digits):
    with pytest.raises(ValueError, match=message):
        make(digits)


# ---------------------------------------------------------------------------------------- old names
def test_old_names_still_work_and_warn():
    from kdtoolkit import callbacks

    with pytest.warns(DeprecationWarning, match="HomogeneityWarning is now .*CollapseWarning"):
        assert callbacks.HomogeneityWarning is CollapseWarning
    for value in (False, "a method"):
        with pytest.warns(DeprecationWarning, match="product=.* is named export=.* now"):
            assert EMATeacher(product=value).export == value
    assert EMATeacher().export is True
