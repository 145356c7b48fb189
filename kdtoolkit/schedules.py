"""Weights and learning rates over time: pure functions of a Clock.

A weight is a number or any callable of a Clock; the classes here print well and compare equal, so that they can stand
in a configuration. Positions are shares of the run, 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdtoolkit.types import Clock, LossWeight


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` between the shares `begin` and `until` of the run, constant before and after."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * _share(clock, self.begin, self.until)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` between the shares `begin` and `until` of the run."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, clock: Clock) -> float:
        share = _share(clock, self.begin, self.until)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Steps:
    """`values[0]` until share `at[0]` of the run, then `values[1]` until `at[1]`, and so on."""

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"Steps needs one value more than positions, got {len(self.values)} and {len(self.at)}"
            )

    def __call__(self, clock: Clock) -> float:
        return self.values[sum(clock.progress >= a for a in self.at)]


def _share(clock: Clock, begin: float, until: float) -> float:
    return min(max((clock.progress - begin) / max(until - begin, 1e-12), 0.0), 1.0)


def check_loss_weight(weight: LossWeight) -> None:
    """ValueError unless it is a number from 0, or callable."""
    if not callable(weight) and not weight >= 0:
        raise ValueError(
            f"the weight is {weight}: a number >= 0, or a schedule (kdtoolkit.schedules)"
        )


def describe_weight(weight: LossWeight) -> float | str:
    """A weight for people: the number, or the schedule as it prints."""
    return weight if isinstance(weight, (int, float)) else repr(weight)


def weight_at(weight: LossWeight, clock: Clock) -> float:
    """The weight at this moment."""
    return float(weight(clock)) if callable(weight) else float(weight)


SCHEDULERS = ("cosine", "multistep", "onecycle", "linear", "constant")


def lr_factor(
    name: str,
    total: int,
    *,
    warmup: int = 0,
    milestones: Sequence[float] = (0.5, 2 / 3, 5 / 6),
    gamma: float = 0.1,
) -> Callable[[int], float]:
    """Learning-rate factor (0 to 1) of optimizer step number n, 0-based, of a run of `total` steps.

    name        "cosine" to 0; "multistep" times `gamma` at each milestone; "onecycle" linear up over the first 30 %,
                down to 0; "linear" down to 0; "constant"
    warmup      optimizer steps of linear warm-up from 0 in front of any of them
    milestones  shares of the run; the default is SRKD's 90, 120 and 150 of 180 epochs
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}")
    if total < 1 or warmup < 0 or warmup > total:
        raise ValueError(
            f"a run of {total} steps cannot warm up for {warmup}: use fewer warm-up epochs"
        )
    marks = [round(m * total) for m in milestones]

    def factor(n: int) -> float:
        if n < warmup:
            return (n + 1) / warmup
        share = min((n - warmup) / max(total - warmup, 1), 1.0)
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        if name == "linear":
            return 1.0 - share
        if name == "onecycle":
            return max(share / 0.3, 1 / max(total, 25)) if share < 0.3 else (1.0 - share) / 0.7
        if name == "multistep":
            return gamma ** sum(n >= m for m in marks)
        return 1.0

    return factor


# ------------------------------------------------------------------------------ coefficients by epoch, of the papers
def sigmoid_rampup(epoch: float, length: float) -> float:
    """exp(-5 (1 - epoch / length)^2) up to `length` epochs, then 1; 0.0067 at epoch 0, which is the first.

    Laine & Aila 2017, "Temporal Ensembling"; length 80 in ONE, OKDDip, PCL and DKEL, 5 to 30 in Mean Teacher. Negative
    epochs count as 0; length 0 is no ramp.
    """
    return math.exp(-5.0 * (1.0 - linear_rampup(epoch, length)) ** 2)


def linear_rampup(epoch: float, length: float) -> float:
    """epoch / length, from 0 to 1 and then 1. Length 0 is no ramp.

    ReviewKD's authors pass the 0-based epoch (the first has weight 0), mdistiller (ReviewKD, DKD) epoch + 1.
    """
    if length < 0:
        raise ValueError(f"a ramp is 0 epochs long or longer, got {length}")
    return min(max(epoch, 0.0) / length, 1.0) if length else 1.0


def cosine_rampdown(epoch: float, length: float) -> float:
    """(1 + cos(pi epoch / length)) / 2, from 1 to 0 at `length` epochs, then 0. Loshchilov & Hutter 2017, "SGDR"."""
    return 0.5 * (1.0 + math.cos(math.pi * linear_rampup(epoch, length)))


def exponential_decay(epoch: float, rate: float = 0.5, cut: float = 0.01) -> float:
    """exp(-rate * epoch), 0 once it is `cut` or less: the share of ensemble knowledge in DKEL (Shao & Chen 2023).

    rate  per epoch; the paper tries 0.05 to 1
    """
    if rate < 0:
        raise ValueError(f"a decay has a rate of 0 or more an epoch, got {rate}")
    share = math.exp(-rate * epoch)
    return share if share > cut else 0.0


def rampup_as_coded(epoch: float, weight: float, until: float = 80) -> float:
    """weight * exp(-5 (1 - epoch / weight)^2) up to epoch `until`, `weight` after it: for reproduction only.

    What the published code of DKEL (weight 0.1) and of PCL's reproduction (weight 1) computes in place of
    weight * sigmoid_rampup(epoch, 80): nearly 0 for all epochs from the second or third to the 80th.
    """
    if weight <= 0:
        raise ValueError(f"this ramp divides by its weight, which must be above 0, got {weight}")
    return weight * math.exp(-5.0 * (1.0 - epoch / weight) ** 2) if epoch <= until else weight


@dataclass(frozen=True)
class SigmoidRampUp:
    """`weight` times `sigmoid_rampup` of the whole epochs that are over; `length` in epochs. None is the papers' 80 in
    runs of 300 epochs and more, and the same share (80 / 300) of shorter ones."""

    weight: float = 1.0
    length: float | None = None

    def __post_init__(self) -> None:
        if self.length is not None and not self.length >= 0:
            raise ValueError(f"a ramp is 0 epochs long or longer, got {self.length}")

    def __call__(self, clock: Clock) -> float:
        epochs = clock.total_steps / max(clock.steps_per_epoch, 1)
        length = 80 * min(epochs / 300, 1.0) if self.length is None else self.length
        return self.weight * sigmoid_rampup(clock.epoch, length)


def with_rampup(
    weights: Mapping[str, LossWeight], terms: Sequence[str], epochs: float | None
) -> dict[str, LossWeight]:
    """The weights, where a length of the ramp-up is given with that ramp-up of these terms."""
    made = dict(weights)
    for term in terms if epochs is not None else ():
        weight = weights[term]
        if isinstance(weight, SigmoidRampUp):
            made[term] = replace(weight, length=epochs)
        elif callable(weight):
            raise ValueError(
                f"rampup_epochs={epochs} and a schedule for {term!r} in losses={{...}}: give one of them"
            )
        elif weight:
            made[term] = SigmoidRampUp(weight, epochs)
    return made


@dataclass(frozen=True)
class LinearRampUp:
    """`weight` times `linear_rampup` of the whole epochs that are over, plus `first` (1 counts epochs from 1)."""

    weight: float = 1.0
    length: float = 20.0
    first: int = 0

    def __call__(self, clock: Clock) -> float:
        return self.weight * linear_rampup(clock.epoch + self.first, self.length)


@dataclass(frozen=True)
class ExponentialDecay:
    """`weight` times `exponential_decay` of the whole epochs that are over."""

    weight: float = 1.0
    rate: float = 0.5
    cut: float = 0.01

    def __call__(self, clock: Clock) -> float:
        return self.weight * exponential_decay(clock.epoch, self.rate, self.cut)


@dataclass(frozen=True)
class RampUpAsCoded:
    """`rampup_as_coded` of the whole epochs that are over."""

    weight: float = 0.1
    until: float = 80.0

    def __call__(self, clock: Clock) -> float:
        return rampup_as_coded(clock.epoch, self.weight, self.until)
