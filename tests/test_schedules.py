"""Weights and learning rates over time."""

import dataclasses
import math

import numpy as np
import pytest

from kdtoolkit import schedules
from kdtoolkit.schedules import Cosine, Linear, SigmoidRampUp, Steps, lr_factor, with_rampup
from kdtoolkit.types import Clock

HALF = Clock(step=50, epoch=5, steps_per_epoch=10, total_steps=100)


def test_schedules_by_share_of_the_run():
    assert Linear(1.0, 0.0)(HALF) == 0.5
    assert Linear(1.0, 3.0, begin=0.25, until=0.75)(HALF) == 2.0
    assert Linear(1.0, 3.0, begin=0.5)(HALF) == 1.0 and Linear(1.0, 3.0, until=0.5)(HALF) == 3.0
    assert Cosine(1.0, 0.0)(HALF) == pytest.approx(0.5)
    assert Cosine(2.0, 1.0)(Clock(total_steps=9)) == 2.0
    steps = Steps((0.25, 0.5), (1.0, 0.1, 0.01))
    assert [steps(Clock(step, total_steps=100)) for step in (0, 25, 49, 50)] == [
        1.0,
        0.1,
        0.1,
        0.01,
    ]
    with pytest.raises(ValueError, match="one value more than positions, got 2 and 2"):
        Steps((0.25, 0.5), (1.0, 0.1))


def test_length_of_the_sigmoid_ramp():
    at_half_of_the_ramp = 0.1 * math.exp(-5 / 4)
    ramp = SigmoidRampUp(0.1)
    assert ramp(Clock(epoch=4, steps_per_epoch=5, total_steps=150)) == at_half_of_the_ramp
    assert ramp(Clock(epoch=40, total_steps=600)) == at_half_of_the_ramp
    assert ramp(Clock(epoch=40, total_steps=300)) == at_half_of_the_ramp
    assert 0.1 * schedules.sigmoid_rampup(40, 80) == at_half_of_the_ramp
    assert SigmoidRampUp(100.0, 5)(Clock(epoch=5)) == 100
    assert repr(SigmoidRampUp()).endswith("None)")
    assert schedules.sigmoid_rampup(3, 0) == schedules.linear_rampup(0, 0) == 1.0


def test_other_ramps_of_the_papers():
    clock = Clock(epoch=40, total_steps=300)
    assert schedules.LinearRampUp(2.0, 80)(clock) == 1.0
    assert schedules.LinearRampUp(first=1, length=20)(Clock()) == 0.05
    assert schedules.ExponentialDecay(2.0)(Clock(epoch=9)) == 2 * math.exp(-4.5)
    assert schedules.ExponentialDecay()(Clock(epoch=10)) == 0.0
    assert schedules.RampUpAsCoded(0.1)(clock) == 0.0
    assert schedules.RampUpAsCoded(0.1)(Clock(epoch=81)) == 0.1
    assert [schedules.cosine_rampdown(e, 10) for e in (0, 10, 11)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("call, words", [
    (lambda: schedules.linear_rampup(1, -1), "length is -1; allowed: a finite number from 0"),
    (lambda: SigmoidRampUp(1.0, -1), "length is -1; allowed: a finite number from 0"),
    (lambda: schedules.exponential_decay(1, -1), "rate is -1; allowed: a finite number from 0"),
    (lambda: schedules.rampup_as_coded(1, 0), "weight is 0; allowed: a finite number above 0"),
    (lambda: schedules.check_loss_weight(-1), "weight is -1; allowed: .* from 0 .or a schedule"),
    (lambda: schedules.check_loss_weight("1"), "weight is '1'; allowed"),
    (lambda: lr_factor("cosin", 10), "scheduler is 'cosin'; allowed: 'cosine', 'multistep'"),
    (lambda: lr_factor("cosine", 10, warmup=11), "10 steps cannot warm up for 11"),
    (lambda: with_rampup({"a": Linear(0, 1)}, ["a"], 5), "rampup_epochs=5 and a schedule for 'a'"),
])  # fmt: skip
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("call, words", [
    (lambda: Linear("x", 0.0), "start is 'x'; allowed: a finite number from 0"),
    (lambda: Linear(1.0, -1.0), "end is -1.0; allowed: a finite number from 0"),
    (lambda: Cosine(1.0, float("nan")), "end is nan; allowed"),
    (lambda: Linear(1.0, 0.0, begin=0.7, until=0.3), "begin is 0.7 and until 0.3; allowed: shares"),
    (lambda: Linear(1.0, 0.0, until=2), "until is 2; allowed: a finite number from 0 up to 1"),
    (lambda: Steps((0.5, 0.2), (1.0, 0.1, 0.0)), "at of Steps is .*; allowed: ascending shares"),
    (lambda: Steps(0.5, (1.0, 0.1)), "at of Steps is 0.5; allowed: a tuple of numbers"),
    (lambda: Steps((0.5,), (1.0, -0.1)), "a value of Steps is -0.1; allowed"),
    (lambda: Steps((1.5,), (1.0, 0.1)), "at of Steps is 1.5; allowed"),
    (lambda: SigmoidRampUp(-1.0), "weight is -1.0; allowed"),
    (lambda: schedules.LinearRampUp(first=0.5), "first is 0.5; allowed: a whole number from 0"),
    (lambda: schedules.LinearRampUp(length="x"), "length is 'x'; allowed"),
    (lambda: schedules.ExponentialDecay(rate=-1), "rate is -1; allowed"),
    (lambda: schedules.ExponentialDecay(cut=1), "cut is 1; allowed"),
    (lambda: schedules.RampUpAsCoded(0.0), "weight is 0.0; allowed: a finite number above 0"),
    (lambda: with_rampup({"a": 0.0}, ["a"], "x"), "rampup_epochs: length is 'x'"),
    (lambda: lr_factor("multistep", 10, milestones=[2.0]), "a milestone is 2.0; allowed"),
    (lambda: lr_factor("multistep", 10, gamma=-1), "gamma is -1; allowed"),
    (lambda: schedules.check_loss_weight(Linear), "weight is the class Linear; .*by calling"),
    (lambda: schedules.check_loss_weight(1e13), "weight is 1.*; allowed: up to 1e.12"),
    (lambda: schedules.check_loss_weight(float("nan"), "w"), "w is nan; allowed"),
])  # fmt: skip
def test_wrong_fields(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("value", ["text", None, True, -1e-9, math.nan, math.inf, [1], 1e300])
def test_what_a_schedule_returns_is_checked_at_its_step(value):
    words = r"the weight of loss 'kd', the schedule <function .*>, returned .* at step 50 of 100 "
    with pytest.raises(ValueError, match=words + r"\(epoch 5\); allowed: a finite number from 0"):
        schedules.weight_at(lambda clock: value, HALF, "kd")


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(2)])
def test_numbers_that_a_schedule_may_return(value):
    found = schedules.weight_at(lambda clock: value, HALF)
    assert found == value and type(found) is float


def test_a_schedule_is_tried_over_the_whole_run():
    seen = []
    schedules.check_over_run(lambda clock: seen.append(clock) or 1.0, dataclasses.replace(HALF))
    steps = [clock.step for clock in seen]
    assert steps[0] == 0 and steps[-1] == 99 and len(steps) > 60 and steps == sorted(set(steps))
    assert all(clock.epoch == clock.step // 10 for clock in seen)
    schedules.check_over_run(1.0, HALF)
    schedules.check_over_run(lambda clock: 1.0, Clock())


@pytest.mark.parametrize("wrong", [0, 50, 99])
def test_a_schedule_that_is_wrong_at_one_step(wrong):
    with pytest.raises(ValueError, match=f"returned -97.0 at step {wrong} of 100"):
        schedules.check_over_run(lambda clock: -97.0 if clock.step == wrong else 1.0, HALF, "kd")


def test_weights_with_a_rampup():
    weights = {"ce": 1.0, "a": 0.5, "b": SigmoidRampUp(2.0), "off": 0}
    assert with_rampup(weights, ["a", "b"], None) == weights
    ramped = with_rampup(weights, ["a", "b", "off"], 7)
    assert ramped == weights | {"a": SigmoidRampUp(0.5, 7), "b": SigmoidRampUp(2.0, 7)}


def test_weights_are_numbers_or_schedules():
    schedules.check_loss_weight(0)
    schedules.check_loss_weight(lambda clock: 1.0)
    assert schedules.weight_at(2, HALF) == 2.0 and schedules.weight_at(Linear(1, 0), HALF) == 0.5
    assert schedules.describe_weight(0.5) == 0.5
    assert schedules.describe_weight(Linear(1, 0)) == "Linear(start=1, end=0, begin=0.0, until=1.0)"


@pytest.mark.parametrize("name", schedules.SCHEDULERS)
def test_learning_rates(name):
    factor = lr_factor(name, 100, warmup=10)
    assert [factor(n) for n in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    values = [factor(n) for n in range(100)]
    assert all(0 <= v <= 1 for v in values)
    last = {"constant": 1.0, "multistep": 1e-3}.get(name)
    assert values[-1] == pytest.approx(last) if last else values[-1] < 0.05


@pytest.mark.parametrize("kind", [
    Linear, Cosine, Steps, SigmoidRampUp,
    schedules.LinearRampUp, schedules.ExponentialDecay, schedules.RampUpAsCoded,
])  # fmt: skip
def test_schedules_are_frozen_data(kind):
    given = {Linear: (1.0, 0.0), Cosine: (1.0, 0.0), Steps: ((0.5,), (1.0, 0.1))}.get(kind, ())
    schedule = kind(*given)
    assert kind(**dataclasses.asdict(schedule)) == schedule
    assert isinstance(schedule(HALF), float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.start = 2.0
