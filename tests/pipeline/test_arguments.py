"""Arguments of `distill()`: what is accepted in several forms, and messages with what to do."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator

from kdtoolkit import Callback, Method, cli, create_method, distill
from kdtoolkit.callbacks import DCLMerger, EarlyStop, MutualKL
from kdtoolkit.core.config import MAX_SEED
from kdtoolkit.core.registries import METHODS
from kdtoolkit.core.strategy import StrategySpec
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses import AT, KD
from kdtoolkit.pipeline.accelerator import check_precision
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import config_to_plain, read_callbacks, read_config
from kdtoolkit.pipeline.method_table import method_options
from kdtoolkit.schedules import Linear
from kdtoolkit.trainer.checks import NonFiniteLoss
from kdtoolkit.types import Step
from tests.wrong_values import VALUES, fault_of

RUN = dict(
    student="cifar_resnet8", train_data="digits", method="none", max_steps=2, batch_size=32,
    train_limit=64, validation=32, num_workers=0, progress="off", report_to="none", log_every=1,
)  # fmt: skip


def call(**options):
    return distill(**{**RUN, **options})


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cifar_resnet8", num_classes=10)


WITH_TEACHER = {"teacher": "cifar_resnet8", "method": "kd", "dry_run": True}
# arguments -> the message, or its beginning
MESSAGES = [
    ({"seed": -1}, "seed is -1; allowed: a whole number from 0 up to"),
    ({"seed": [0, 1]}, r"seed is \[0, 1\]; allowed: a whole number from 0"),
    ({"seed": 2**64}, "seed is 18446744073709551616; allowed: a whole number from 0 up to"),
    ({"seed": MAX_SEED + 1}, "seed is .*; allowed: a whole number from 0 up to"),
    ({"lr": 0}, "lr is 0: nothing would be trained; give a number above 0"),
    ({"milestones": [2.0]}, "a milestone is 2.0; allowed: a finite number from 0 up to 1"),
    ({"milestones": [-1]}, "a milestone is -1; allowed: a finite number from 0 up to 1"),
    ({"milestones": 0.5}, "milestones is 0.5; allowed: a list of shares of the run"),
    (WITH_TEACHER | {"temperature": True}, "temperature is True; allowed: a finite number above 0"),
    (WITH_TEACHER | {"temperature": 1e-30}, "temperature is 1e-30; allowed: from 0.001 up to"),
    (WITH_TEACHER | {"temperature": 1e9}, "temperature is 1000000000.0; allowed: from 0.001"),
    (WITH_TEACHER | {"temperature": float("inf")}, "temperature is inf; allowed: a finite number"),
    ({"optimizer": torch.optim.SGD}, "optimizer is <class .*give its name, 'sgd', 'nesterov'"),
    ({"optimizer": [1]}, r"optimizer is \[1\]: give its name, 'sgd', 'nesterov'"),
    ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; allowed: None, 'no', 'fp16', 'bf16'"),
    ({"mixed_precision": "float16"}, "mixed_precision is 'float16'; write 'fp16'. Allowed: None"),
    ({"mixed_precision": 16}, "mixed_precision is 16; allowed: None, 'no', 'fp16', 'bf16'"),
    ({"callbacks": EarlyStop()}, r"callbacks is .*allowed: a list .*callbacks=\[EarlyStop\(\)\]"),
    ({"callbacks": "EarlyStop"}, "callbacks is 'EarlyStop'; allowed: a list"),
    ({"callbacks": [EarlyStop]}, "callbacks holds <class .*made by calling its class"),
    ({"callbacks": [TWICE := Callback(), TWICE]}, "callbacks holds one object twice"),
    ({"accelerator": Accelerator}, "accelerator is <class .*made by calling its class, or None"),
    ({"dry_run": "yes"}, "dry_run is 'yes'; allowed: True, False"),
    ({"compile": "no"}, "compile is 'no'; allowed: True, False"),
    ({"channels_last": 1}, "channels_last is 1; allowed: 'auto', True, False"),
    ({"label": 3}, "label is 3; allowed: text"),
    ({"report_to": 3}, "report_to is 3; allowed: 'auto', 'none', the name of a tracker"),
    ({"epochs": 10**30, "max_steps": None}, "epochs is .*; allowed: a whole number from 1 up to"),
    ({"method": AT}, r"method=<class .*AT is a class: give its name 'at', or an object"),
    ({"method": [AT]}, r"method holds <class .*AT is a class: give its name 'at'"),
    ({"method": ["kd", "kd"]}, "method names 'kd' twice: name it once"),
    ({"method": None}, "method=None: a name of list_methods"),
    (WITH_TEACHER | {"losses": "kd"}, r"losses is 'kd'; allowed: a dictionary of names and values"),
    (WITH_TEACHER | {"losses": ["kd"]}, r"losses is \['kd'\]; allowed: a dictionary"),
    (WITH_TEACHER | {"losses": {"kd": float("nan")}}, "the weight of loss 'kd' is nan: a"),
    (WITH_TEACHER | {"losses": {"kd": float("inf")}}, "the weight of loss 'kd' is inf: a"),
    (WITH_TEACHER | {"losses": {"kd": 1e30}}, "the weight of loss 'kd' is 1e"),
    (WITH_TEACHER | {"losses": {"kd": True}}, "the weight of loss 'kd' is True: a number >= 0"),
    (WITH_TEACHER | {"losses": {"kd": "1"}}, "the weight of loss 'kd' is '1': a number >= 0"),
    (WITH_TEACHER | {"losses": {"kd": Linear}}, "the weight of loss 'kd' is <class .*Linear"),
    (WITH_TEACHER | {"method": "at", "p": "min"}, "p is 'min'; allowed: .*'max', the maximum over"),
    (WITH_TEACHER | {"method": "srkd", "detach": "no"}, "detach is 'no'; allowed: True, False"),
    (WITH_TEACHER | {"method": "srkd", "reset": [True]}, r"reset is \[True\]; allowed: 'all' or a"),
    (WITH_TEACHER | {"method": "fitnet", "hint": True}, "hint is True; allowed: a pair of stages"),
    ({"method": "dml", "peers": 10**9}, "peers is 1000000000; allowed: a whole number of networks"),
    ({"method": "dml", "detach": 0}, "detach is 0; allowed: True, False"),
    ({"method": "cl", "share_gradient": "no"}, "share_gradient is 'no'; allowed: True, False"),
    ({"method": "cl", "cut": 1.0}, "cut is 1.0; allowed: the number of a stage, the name of a"),
    ({"method": "dcl", "beta": "x"}, "beta is 'x'; allowed: a finite number from 0 up to 1"),
    ({"method": "dcl", "every": 3}, "merges every 3 steps, and the run has 2: .*smaller every"),
    ({"method": "dcl", "every": 2, "unit": "epochs"}, "merges every 2 epochs, and the run has 1"),
    ({"teacher_args": {"x": 1}}, "teacher_args has no effect: method 'none' has no teacher"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", MESSAGES)
def test_a_message_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


@pytest.mark.parametrize("precision", ["fp16"])
def test_half_precision_needs_a_gpu(precision, monkeypatch):
    monkeypatch.setattr("kdtoolkit.pipeline.accelerator._has_gpu", lambda: False)
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="fp16' needs a GPU.*'bf16', which a CPU computes"):
            call(mixed_precision=precision, dry_run=dry_run)
    monkeypatch.setattr("kdtoolkit.pipeline.accelerator._has_gpu", lambda: True)
    check_precision(precision, None)


def test_settings_of_the_launcher_that_accelerate_refuses(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp17")
    with pytest.raises(ValueError, match="accelerator has mixed_precision='fp17', .*allowed"):
        call()


@pytest.mark.parametrize("given", [None, (), [], iter(())])
def test_no_callbacks(given):
    assert call(callbacks=given, dry_run=True).plan["losses"]


def test_callbacks_from_a_generator_are_called():
    seen = []

    class See(Callback):
        def on_step_end(self, run, step):
            seen.append(run.clock.step)

    call(callbacks=(See() for _ in range(1)))
    assert seen == [1, 2]


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor, np.array])
def test_scalars_of_numpy_and_torch_are_numbers(kind):
    whole = torch.tensor if kind is torch.tensor else np.int64
    config = DistillConfig.from_keywords(
        lr=kind(0.5), momentum=kind(0.5), seed=whole(3), batch_size=whole(32),
        temperature=kind(2.0), milestones=[kind(0.5)], losses={"ce": kind(0.5)},
        train_limit=whole(64), p=kind(1.5),
        reset=[whole(2)], compile=np.bool_(False), validation=kind(0.25),
    )  # fmt: skip
    assert config == DistillConfig.from_keywords(
        lr=0.5, momentum=0.5, seed=3, batch_size=32, temperature=2.0, milestones=[0.5],
        losses={"ce": 0.5}, train_limit=64, p=1.5, reset=[2], compile=False, validation=0.25,
    )  # fmt: skip
    assert type(config.optim.lr) is float and type(config.loop.seed) is int
    assert type(config.loss.losses["ce"]) is float


def test_a_run_with_numpy_numbers_is_the_run_with_plain_ones(tmp_path):
    plain = call(lr=0.25, seed=3, losses={"ce": 0.5})
    options = {"lr": np.float32(0.25), "seed": np.int64(3), "losses": {"ce": torch.tensor(0.5)}}
    again = call(**options, output_dir=tmp_path / "run", callbacks=[EarlyStop(np.int64(5))])
    losses = [[r["loss"] for r in run.history if r["event"] == "train"] for run in (plain, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    read = read_config(tmp_path / "run")
    assert (read.optim.lr, read.loop.seed, read.loss.losses) == (0.25, 3, {"ce": 0.5})
    assert read_callbacks(tmp_path / "run")[0].patience == 5


def test_a_tensor_that_is_no_number_is_no_number():
    for value in (torch.tensor([1.0, 2.0]), torch.tensor(1.0, requires_grad=True),
                  torch.empty((), device="meta")):  # fmt: skip
        with pytest.raises(ValueError, match="lr is tensor"):
            DistillConfig.from_keywords(lr=value)


def test_a_part_of_another_type_is_refused():
    with pytest.raises(ValueError, match="optim is 3; allowed: a OptimConfig"):
        DistillConfig(optim=3)


@pytest.mark.parametrize("plain, message", [
    ({"optim": 3}, "optim holds 3; a mapping of fields is needed"),
    ({"optim": {1: 2}}, "optim holds .*; a mapping of fields"),
    ({"lr": 0.1, 3: 4}, "unknown 3"),
    ({"losses": {"kd": {"schedule": "Linear", "begin": 1}}}, "kd: Linear: missing a required"),
    ({"losses": {"kd": {"schedule": ["Linear"]}}}, "unknown schedule"),
    (5, "config holds int; a mapping of fields is needed"),
])  # fmt: skip
def test_wrong_files_are_refused(plain, message):
    with pytest.raises(ValueError, match=message):
        read_config(plain)
    with pytest.raises(ValueError, match=message):
        distill(config=plain)


@pytest.mark.parametrize("callbacks, message", [
    (3, "callbacks is 3; a list is needed"),
    ([3], "callbacks holds 3; a mapping of a class and its arguments"),
    ([{"callback": "EarlyStopp"}], "callbacks: unknown 'EarlyStopp'; did you mean 'EarlyStop'"),
    ([{"callback": "EarlyStop", "patient": 3}], "callbacks: EarlyStop: got an unexpected keyword"),
    ([{"callback": "EarlyStop", "patience": "x"}], "patience is 'x'; allowed"),
])  # fmt: skip
def test_wrong_callbacks_of_a_file_are_refused(callbacks, message):
    with pytest.raises(ValueError, match=message):
        read_callbacks({"callbacks": callbacks})


# ------------------------------------------------------------------------------ options of methods
OPTIONS = [(name, option.name) for name in METHODS.names()
           if METHODS[name].__class__.__module__.startswith("kdtoolkit")
           for option in method_options(name)]  # fmt: skip


@pytest.mark.parametrize("name, option", OPTIONS)
def test_options_of_methods_refuse_what_they_cannot_use(name, option):
    spec = METHODS[name]
    needs_teacher = not isinstance(spec, StrategySpec) or spec.needs_teacher
    given = {
        "method": name,
        "teacher": "cifar_resnet8" if needs_teacher and name != "none" else None,
    }
    for label in ("object",) if name == "dkel" else ("object", "nan"):
        options = given | {option: VALUES[label], "dry_run": True}
        assert fault_of(lambda options=options: call(**options)) is None, label


# ------------------------------------------------------------------------------- weights over time
def fails(clock):
    raise ZeroDivisionError("no such step")


SCHEDULES = [
    (lambda clock: "text", "returned 'text' at step 0 of 2"),
    (lambda clock: -97.0, "returned -97.0 at step 0 of 2"),
    (lambda clock: float("nan"), "returned nan at step 0"),
    (lambda clock: None, "returned None at step 0"),
    (lambda clock: True, "returned True at step 0"),
    (lambda clock: torch.tensor([1.0, 2.0]), "returned tensor.* at step 0"),
    (lambda clock: 1.0 - 2.0 * clock.step, "returned -1.0 at step 1 of 2"),
    (fails, "raised ZeroDivisionError: no such step at step 0 of 2.*a function of a Clock"),
    (lambda: 1.0, "raised TypeError"),
]


@pytest.mark.parametrize("schedule, message", SCHEDULES)
@pytest.mark.parametrize("place", ["losses", "callback"])
def test_schedules_are_tried_before_anything_is_written(place, schedule, message, tmp_path):
    options = {"losses": {"ce": schedule}}
    if place == "callback":
        options = {"method": "dml", "losses": {"ce": 1.0, "mutual": 0.0},
                   "callbacks": [Named(schedule)]}  # fmt: skip
    name = "ce" if place == "losses" else "mutual"
    with pytest.raises(ValueError, match=f"the weight of loss '{name}', the schedule .*{message}"):
        call(**options, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Named(MutualKL):
    name = "another"


def test_a_schedule_that_fails_between_the_samples_fails_at_its_step():
    method = create_method("none", Taps(network(), None, 16), losses={"ce": Seldom()})
    with pytest.raises(ValueError, match="the weight of loss 'ce', .*returned -1.0 at step 1 of 2"):
        call(student=None, method=method)


class Seldom:
    """Right whenever it is tried, wrong in training."""

    calls = 0

    def __call__(self, clock):
        self.calls += 1
        return 1.0 if self.calls < 6 or clock.step < 1 else -1.0


def test_a_schedule_that_is_right_trains():
    losses = {"ce": lambda clock: np.float32(0.5), "kd": Linear(1.0, 0.0)}
    plan = call(**(WITH_TEACHER | {"losses": losses})).plan
    assert {row["loss"] for row in plan["losses"]} == {"ce", "kd"}


def test_the_default_interval_of_a_short_run_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        call(method="dcl")
    assert (
        "DCLMerger merges every 10 steps, and the run has 2: no weights are merged" in caplog.text
    )
    caplog.clear()
    call(method="dcl", every=2)
    call(method="dcl", every=1000, beta=0.0)
    assert "no weights are merged" not in caplog.text


def test_an_interval_in_optimizer_steps():
    with pytest.raises(ValueError, match="merges every 2 steps, and the run has 1"):
        call(method="dcl", every=2, max_steps=1, grad_accum=2)


# ------------------------------------------------------------------------------ losses of callbacks
def returning(make):
    class Mine(Callback):
        def on_losses(self, run, step, batch):
            return make(step)

    return Mine()


def logits(step):
    return step.logits["student"].float()


RETURNED = [
    (lambda step: {"mine": logits(step).mean(1)}, ValueError,
     r"the callback Mine returned the loss 'mine' of shape \(32,\); allowed: a scalar"),
    (lambda step: {"mine": 3.0}, ValueError,
     "the callback Mine returned the loss 'mine' as 3.0; allowed: a scalar tensor"),
    (lambda step: {"mine": None}, ValueError, "returned the loss 'mine' as None"),
    (lambda step: {"mine": torch.tensor(3)}, ValueError, "as torch.int64; allowed: a floating"),
    (lambda step: logits(step).mean(), ValueError,
     "the callback Mine returned tensor.* as losses; allowed: a dictionary of named scalars"),
    (lambda step: 3, ValueError, "the callback Mine returned 3 as losses"),
    (lambda step: {"ce": logits(step).mean()}, ValueError, "callback Mine returns the loss 'ce'"),
    (lambda step: {"mine": logits(step).detach().mean()}, RuntimeError,
     "the loss 'mine' of the callback Mine reaches no trained parameter"),
    (lambda step: {"mine": logits(step).mean() * float("nan")}, NonFiniteLoss,
     "'mine' is not finite at step 0.*this term, which the callback Mine returns"),
]  # fmt: skip


@pytest.mark.parametrize("make, error, message", RETURNED)
def test_a_wrong_loss_of_a_callback_names_the_callback(make, error, message):
    with pytest.raises(error, match=message):
        call(callbacks=[returning(make)])


def test_a_callback_may_return_none_or_nothing():
    call(callbacks=[returning(lambda step: None), returning(lambda step: {})])


class Own(Method):
    """A method whose forward returns what it is told."""

    def __init__(self, returned):
        super().__init__()
        self.student, self.returned = network(), returned

    def forward(self, batch, clock):
        z = self.student(batch["x"])
        return self.returned(z)

    def networks(self):
        return {"student": self.student}

    def logits(self, name, x):
        return self.student(x)


@pytest.mark.parametrize("returned, message", [
    (lambda z: {"ce": z.mean()}, "Own returned .*; allowed: kdtoolkit.types.Step"),
    (lambda z: Step({"ce": z}, {"student": z}), r"the method Own returned the loss 'ce' of shape"),
    (lambda z: Step({"ce": 3.0}, {"student": z}), "the method Own returned the loss 'ce' as 3.0"),
    (lambda z: Step(z.mean(), {"student": z}), "the method Own returned tensor.* as losses"),
])  # fmt: skip
def test_a_wrong_step_of_a_method_is_named(returned, message):
    with pytest.raises(ValueError, match=message):
        call(student=None, method=Own(returned))


# ------------------------------------------------------------------------------ objects as methods
def test_objects_of_losses_and_names():
    student, teacher = Taps(network(), [3], 16), Frozen(network(1), [3], 16)
    with pytest.raises(ValueError, match="method holds the name 'kd' and an object of this loss"):
        create_method(["kd", KD(student, teacher)], student, [teacher])
    at = AT(student, teacher, [(3, 3)])
    with pytest.raises(ValueError, match="method names AT.* twice"):
        create_method([at, at], student, [teacher])
    assert list(create_method(["kd", at], student, [teacher]).weights) == ["ce", "kd", "at"]


@pytest.mark.parametrize("make, message", [
    (lambda s, t: AT(s.model, t, [(3, 3)]), "AT got an object of ResNet as student; allowed: Taps"),
    (lambda s, t: AT(s, t.model, [(3, 3)]), "AT got an object of ResNet as teacher; .*Frozen"),
    (lambda s, t: KD(s, None), "KD got None as teacher; allowed: Frozen"),
    (lambda s, t: AT(s, t, (3, 3)), r"AT compares features: give pairs of taps"),
    (lambda s, t: AT(s, t, [(3, True)]), "AT compares features: give pairs of taps"),
])  # fmt: skip
def test_losses_need_taps(make, message):
    student, teacher = Taps(network(), [3], 16), Frozen(network(1), [3], 16)
    with pytest.raises(ValueError, match=message):
        make(student, teacher)


def test_merging_needs_no_more_than_its_interval():
    assert DCLMerger(np.int64(2)).plan_notes()[0].startswith("every 2 steps")


def test_plain_numbers_are_written(tmp_path):
    plain = config_to_plain(DistillConfig(), {"lr": np.float32(0.5), "epochs": np.int64(2)})
    assert (plain["optim"]["lr"], plain["optim"]["epochs"]) == (0.5, 2)
    assert type(plain["optim"]["lr"]) is float and type(plain["optim"]["epochs"]) is int


# ---------------------------------------------------------------------------------------- the shell
@pytest.mark.parametrize("flags, words", [
    ("--lr x", "lr is 'x'; allowed: a finite number from 0"),
    ("--lr 0", "lr is 0: nothing would be trained"),
    ("--epochs 1.5", "epochs is 1.5; allowed: a whole number from 1"),
    ("--max-steps many", "max_steps is 'many'; allowed: a whole number"),
    ("--batch-size x", "batch_size is 'x'; allowed: a whole number from 1"),
    ("--seed -1", "seed is -1; allowed: a whole number from 0"),
    ("--temperature inf", "temperature is inf; allowed: a finite number above 0"),
    ("--milestones 2.0", "a milestone is 2.0; allowed: a finite number from 0 up to 1"),
    ("--log-every 0", "log_every is 0; allowed: a whole number from 1"),
    ("--freeze 0", "freeze=0: stages from the image as a number from 1"),
    ("--grad-clip none --lr nan", "lr is nan; allowed"),
])  # fmt: skip
def test_values_of_the_shell_are_refused_in_the_same_words(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse_config(["--student", "cifar_resnet8", *flags.split()], "train")
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in err


def test_none_in_the_shell_is_the_default():
    words = "--lr none --epochs none --grad-clip none".split()
    config, _ = cli.parse_config(["--student", "cifar_resnet8", *words], "train")
    assert config == DistillConfig.from_keywords(student="cifar_resnet8")
