"""Weights and learning rates over time: functions of the position in a run.

The weight of a loss is a number or any callable of a `Clock`. The classes here are such callables;
they print well and compare equal, so that they can stand in a configuration. `Linear`, `Cosine` and
`Steps` work on shares of the run, 0 to 1; the ramps of the papers on whole epochs.

Example:
    >>> from kdtoolkit import distill
    >>> from kdtoolkit.schedules import Linear
    >>> losses = {"ce": 0.1, "kd": Linear(0.9, 0.0)}
    >>> result = distill("cifar_resnet56", "cifar_resnet20", "digits", losses=losses)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdtoolkit.types import Clock, LossWeight
from kdtoolkit.utils.validation import (
    check_choice,
    check_fraction,
    check_non_negative,
    check_number,
    check_positive,
    check_whole_number,
    describe_value,
    plain_scalar,
)

PAPER_RAMPUP_EPOCHS, PAPER_EPOCHS = 80, 300  # of ONE, OKDDip, PCL and DKEL
MAX_WEIGHT = 1e12  # of a loss; the largest of the papers is 30,000
NUM_SAMPLES = 64  # positions of a run at which a schedule is looked at before the run starts


# ------------------------------------------------------------------------- shares of the run
@dataclass(frozen=True)
class Linear:
    """From one weight to another along a straight line, constant before and after.

    Attributes:
        start: Weight up to the share `begin`.
        end: Weight from the share `until` on.
        begin: Share of the run, 0 to 1, at which the change begins.
        until: Share of the run, 0 to 1, at which it ends.

    Raises:
        ValueError: For a weight that is no number, or shares that are none or not in order.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_change(self.start, self.end, self.begin, self.until)

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        return self.start + (self.end - self.start) * _share(clock, self.begin, self.until)


@dataclass(frozen=True)
class Cosine:
    """From one weight to another along half a cosine, constant before and after.

    end + (start - end) (1 + cos(pi share)) / 2, where share goes from 0 to 1.

    Attributes:
        start: Weight up to the share `begin`.
        end: Weight from the share `until` on.
        begin: Share of the run, 0 to 1, at which the change begins.
        until: Share of the run, 0 to 1, at which it ends.

    Raises:
        ValueError: For a weight that is no number, or shares that are none or not in order.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check_change(self.start, self.end, self.begin, self.until)

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        share = _share(clock, self.begin, self.until)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Steps:
    """A weight that jumps: `values[0]` until the share `at[0]`, then `values[1]` until `at[1]`, ...

    Attributes:
        at: Shares of the run, 0 to 1, ascending.
        values: Weights, one more than shares.

    Raises:
        ValueError: If the numbers of shares and weights do not fit, a share is not from 0 to 1 and
            above the one before, or a weight is no number from 0.
    """

    at: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, numbers in (("at", self.at), ("values", self.values)):
            if not isinstance(numbers, (list, tuple)):
                raise ValueError(
                    f"{name} of Steps is {describe_value(numbers)}; allowed: a tuple of numbers"
                )
        for share in self.at:
            check_fraction("at of Steps", share, "share of the run")
        for value in self.values:
            check_non_negative("a value of Steps", value)
        if list(self.at) != sorted(self.at):
            raise ValueError(f"at of Steps is {self.at}; allowed: ascending shares of the run")
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"Steps needs one value more than positions, got {len(self.values)} and "
                f"{len(self.at)}"
            )

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        return self.values[sum(clock.progress >= a for a in self.at)]


def _check_change(start: float, end: float, begin: float, until: float) -> None:
    """Check the fields of `Linear` and `Cosine`."""
    check_non_negative("start", start, "weight at the beginning")
    check_non_negative("end", end, "weight at the end")
    check_fraction("begin", begin, "share of the run")
    check_fraction("until", until, "share of the run")
    if begin > until:
        raise ValueError(
            f"begin is {begin} and until {until}; allowed: shares of the run, begin <= until"
        )


def _share(clock: Clock, begin: float, until: float) -> float:
    """Share of the way from `begin` to `until` that is over, 0 to 1."""
    return min(max((clock.progress - begin) / max(until - begin, 1e-12), 0.0), 1.0)


# ------------------------------------------------------------------------------ loss weights
def check_loss_weight(weight: object, name: str = "weight") -> None:
    """Check that a weight is a finite number from 0, or a schedule.

    Args:
        weight: What was given.
        name: What it is the weight of, for the message.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(weight, type) and callable(weight):
        raise ValueError(
            f"{name} is the class {weight.__name__}; allowed: a finite number from 0, or a "
            f"schedule, made by calling the class: {weight.__name__}(...)"
        )
    if callable(weight):
        return
    check_non_negative(name, weight, "or a schedule, see kdtoolkit.schedules")
    if weight > MAX_WEIGHT:  # type: ignore[operator]
        raise ValueError(
            f"{name} is {describe_value(weight)}; allowed: up to {MAX_WEIGHT:g} (more overflows "
            "in float32)"
        )


def describe_weight(weight: LossWeight) -> float | str:
    """A weight as the plan shows it.

    Args:
        weight: A number or a schedule.

    Returns:
        The number, or the schedule as it prints.
    """
    number = plain_scalar(weight)
    return number if isinstance(number, (int, float)) else repr(weight)


def weight_at(weight: LossWeight, clock: Clock, name: str = "") -> float:
    """The value of a weight at a position in the run.

    Args:
        weight: A number or a schedule.
        clock: The position.
        name: What it is the weight of, for the message.

    Returns:
        The number.

    Raises:
        ValueError: If a schedule fails, or returns what is no finite number from 0.
    """
    if not callable(weight):
        return float(weight)
    try:
        value = weight(clock)
    except Exception as error:
        raise ValueError(
            f"{_describe_schedule(weight, name)} raised {type(error).__name__}: {error} "
            f"{_position(clock)}; a schedule is a function of a Clock (step, epoch, "
            "steps_per_epoch, total_steps, progress) that returns a number"
        ) from error
    # the usual case in one comparison: this runs at every step
    number = value if type(value) is float else plain_scalar(value)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not 0 <= number <= MAX_WEIGHT:  # type: ignore[operator]
        raise ValueError(
            f"{_describe_schedule(weight, name)} returned {describe_value(value)} "
            f"{_position(clock)}; allowed: a finite number from 0 up to {MAX_WEIGHT:g}"
        )
    return float(number)  # type: ignore[arg-type]


def _describe_schedule(schedule: object, name: str) -> str:
    what = f"the weight of loss {name!r}" if name else "the weight of a loss"
    return f"{what}, the schedule {describe_value(schedule)},"


def _position(clock: Clock) -> str:
    return f"at step {clock.step} of {clock.total_steps} (epoch {clock.epoch})"


def check_over_run(weight: LossWeight, clock: Clock, name: str = "") -> None:
    """Check a schedule at both ends of a run and at positions between, before anything is trained.

    Args:
        weight: A number or a schedule; it is called some dozen times, out of order with the run.
        clock: The length of the run.
        name: What it is the weight of, for the message.

    Raises:
        ValueError: If it fails at one of the positions, or returns no finite number from 0.
    """
    if not callable(weight):
        return
    last = max(clock.total_steps - 1, 0)
    steps = {round(last * k / NUM_SAMPLES) for k in range(NUM_SAMPLES + 1)}
    for step in sorted(steps):
        epoch = step // max(clock.steps_per_epoch, 1)
        weight_at(weight, replace(clock, step=step, epoch=epoch), name)


def with_rampup(
    weights: Mapping[str, LossWeight], terms: Sequence[str], epochs: float | None
) -> dict[str, LossWeight]:
    """Weights in which some terms ramp up over a given number of epochs.

    Args:
        weights: Weight of each term.
        terms: The terms that ramp up: a `SigmoidRampUp` gets the length, a number becomes one.
        epochs: Length of the ramp-up; None leaves all weights as they are.

    Returns:
        The weights of all terms.

    Raises:
        ValueError: If a length is given for a term that has another schedule.
    """
    result = dict(weights)
    if epochs is None:
        return result
    check_non_negative("rampup_epochs: length", epochs, "epochs of a ramp")
    for term in terms:
        weight = weights[term]
        if isinstance(weight, SigmoidRampUp):
            result[term] = replace(weight, length=epochs)
        elif callable(weight):
            raise ValueError(
                f"rampup_epochs={epochs} and a schedule for {term!r} in losses={{...}}: give one "
                "of them"
            )
        elif weight:
            result[term] = SigmoidRampUp(weight, epochs)
    return result


# ---------------------------------------------------------------------------- learning rates
SCHEDULERS = ("cosine", "multistep", "onecycle", "linear", "constant")
ONECYCLE_RISE = 0.3  # share of the run


def lr_factor(
    name: str,
    total: int,
    *,
    warmup: int = 0,
    milestones: Sequence[float] = (0.5, 2 / 3, 5 / 6),
    gamma: float = 0.1,
) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step of a run.

    Args:
        name: "cosine": down to 0 along half a cosine; "linear": down to 0; "onecycle": linearly up
            over the first 30 % of the run and down to 0; "multistep": times `gamma` at each
            milestone; "constant".
        total: Optimizer steps of the run.
        warmup: Optimizer steps of linear warm-up from 0, in front of any of them.
        milestones: Shares of the run, 0 to 1, of "multistep"; the default is SRKD's epochs 90, 120
            and 150 of 180.
        gamma: Factor of "multistep" at each milestone.

    Returns:
        Function of the number of an optimizer step, from 0, that returns the factor, 0 to 1.

    Raises:
        ValueError: If the name is unknown, a milestone is no share, or the warm-up is longer than
            the run.
    """
    check_choice("scheduler", name, SCHEDULERS)
    check_whole_number("total", total, meaning="optimizer steps of the run")
    check_non_negative("gamma", gamma)
    for milestone in milestones:
        check_fraction("a milestone", milestone, "share of the run")
    if not 0 <= warmup <= total:
        raise ValueError(
            f"a run of {total} steps cannot warm up for {warmup}: use fewer warm-up epochs"
        )
    milestone_steps = [round(m * total) for m in milestones]

    def factor(n: int) -> float:
        if n < warmup:
            return (n + 1) / warmup
        share = min((n - warmup) / max(total - warmup, 1), 1.0)
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        if name == "linear":
            return 1.0 - share
        if name == "onecycle":
            return _onecycle_factor(share, total)
        if name == "multistep":
            return gamma ** sum(n >= m for m in milestone_steps)
        return 1.0

    return factor


def _onecycle_factor(share: float, total: int) -> float:
    if share < ONECYCLE_RISE:
        return max(share / ONECYCLE_RISE, 1 / max(total, 25))
    return (1.0 - share) / (1.0 - ONECYCLE_RISE)


# -------------------------------------------------------------- ramps of the papers, by epoch
def sigmoid_rampup(epoch: float, length: float) -> float:
    """Ramp-up of the papers: exp(-5 (1 - epoch / length)^2) up to `length` epochs, then 1.

    Source: Laine & Aila 2017, "Temporal ensembling for semi-supervised learning". The length is 80
    in ONE, OKDDip, PCL and DKEL, and 5 to 30 in Mean Teacher.

    Args:
        epoch: Epochs that are over; the first has 0 and the value 0.0067. Below 0 counts as 0.
        length: Epochs, from 0; 0 is no ramp.

    Returns:
        Factor, 0 to 1.
    """
    return math.exp(-5.0 * (1.0 - linear_rampup(epoch, length)) ** 2)


def linear_rampup(epoch: float, length: float) -> float:
    """Straight ramp: epoch / length up to `length` epochs, then 1.

    ReviewKD's authors pass the epoch from 0, so that the first has the weight 0; mdistiller
    (ReviewKD, DKD) passes epoch + 1.

    Args:
        epoch: Epochs; below 0 counts as 0.
        length: Epochs, from 0; 0 is no ramp.

    Returns:
        Factor, 0 to 1.

    Raises:
        ValueError: If the length is below 0.
    """
    check_non_negative("length", length, "epochs of a ramp")
    return min(max(epoch, 0.0) / length, 1.0) if length else 1.0


def cosine_rampdown(epoch: float, length: float) -> float:
    """Ramp-down along half a cosine: (1 + cos(pi epoch / length)) / 2, from `length` epochs on 0.

    Source: Loshchilov & Hutter 2017, "SGDR: Stochastic gradient descent with warm restarts".

    Args:
        epoch: Epochs that are over.
        length: Epochs, from 0.

    Returns:
        Factor, from 1 down to 0.
    """
    return 0.5 * (1.0 + math.cos(math.pi * linear_rampup(epoch, length)))


def exponential_decay(epoch: float, rate: float = 0.5, cut: float = 0.01) -> float:
    """Exponential decay: exp(-rate * epoch), and 0 once that is `cut` or less.

    Source: the share of ensemble knowledge in DKEL, Shao & Chen 2023, "Decoupled knowledge with
    ensemble learning for online distillation".

    Args:
        epoch: Epochs that are over.
        rate: Per epoch, from 0; the paper tries 0.05 to 1.
        cut: Largest share that becomes 0.

    Returns:
        Share, from 1 down to 0.

    Raises:
        ValueError: If the rate is below 0.
    """
    check_non_negative("rate", rate, "decay per epoch")
    share = math.exp(-rate * epoch)
    return share if share > cut else 0.0


def rampup_as_coded(epoch: float, weight: float, until: float = 80) -> float:
    """Ramp-up as published code has it, for reproduction only.

    weight * exp(-5 (1 - epoch / weight)^2) up to epoch `until`, then `weight`. That is computed
    in place of `weight * sigmoid_rampup(epoch, 80)`, and nearly 0 from the second or third epoch
    to the 80th.

    Source: the authors' code of DKEL (Shao & Chen 2023; weight 0.1) and the reproduction of PCL
    (Wu & Gong 2021; weight 1).

    Args:
        epoch: Epochs that are over.
        weight: Final weight, above 0.
        until: Last epoch of the ramp.

    Returns:
        The weight in this epoch.

    Raises:
        ValueError: If the weight is not above 0.
    """
    check_positive("weight", weight, "this ramp divides by it")
    return weight * math.exp(-5.0 * (1.0 - epoch / weight) ** 2) if epoch <= until else weight


@dataclass(frozen=True)
class SigmoidRampUp:
    """A weight times `sigmoid_rampup` of the whole epochs that are over.

    Attributes:
        weight: Final weight.
        length: Epochs of the ramp, from 0. None is the papers' 80 in runs of 300 epochs and more,
            and the same share (80 / 300) of shorter ones.

    Raises:
        ValueError: If the weight or the length is no number from 0.
    """

    weight: float = 1.0
    length: float | None = None

    def __post_init__(self) -> None:
        check_non_negative("weight", self.weight, "at the end of the ramp")
        if self.length is not None:
            check_non_negative("length", self.length, "epochs of a ramp")

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        epochs = clock.total_steps / max(clock.steps_per_epoch, 1)
        length = self.length
        if length is None:
            length = PAPER_RAMPUP_EPOCHS * min(epochs / PAPER_EPOCHS, 1.0)
        return self.weight * sigmoid_rampup(clock.epoch, length)


@dataclass(frozen=True)
class LinearRampUp:
    """A weight times `linear_rampup` of the whole epochs that are over.

    Attributes:
        weight: Final weight.
        length: Epochs of the ramp, from 0.
        first: Number of the first epoch: 0, or 1 to start above 0.

    Raises:
        ValueError: If the weight or the length is no number from 0, or `first` no whole number.
    """

    weight: float = 1.0
    length: float = 20.0
    first: int = 0

    def __post_init__(self) -> None:
        check_non_negative("weight", self.weight, "at the end of the ramp")
        check_non_negative("length", self.length, "epochs of a ramp")
        check_whole_number("first", self.first, minimum=0, meaning="number of the first epoch")

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        return self.weight * linear_rampup(clock.epoch + self.first, self.length)


@dataclass(frozen=True)
class ExponentialDecay:
    """A weight times `exponential_decay` of the whole epochs that are over.

    Attributes:
        weight: Weight of the first epoch.
        rate: Per epoch, from 0.
        cut: Largest share that becomes 0.

    Raises:
        ValueError: If the weight or the rate is no number from 0, or `cut` not from 0 to below 1.
    """

    weight: float = 1.0
    rate: float = 0.5
    cut: float = 0.01

    def __post_init__(self) -> None:
        check_non_negative("weight", self.weight, "of the first epoch")
        check_non_negative("rate", self.rate, "decay per epoch")
        check_number("cut", self.cut, minimum=0, below=1, meaning="a share")

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        return self.weight * exponential_decay(clock.epoch, self.rate, self.cut)


@dataclass(frozen=True)
class RampUpAsCoded:
    """`rampup_as_coded` of the whole epochs that are over, for reproduction only.

    Attributes:
        weight: Final weight, above 0.
        until: Last epoch of the ramp.

    Raises:
        ValueError: If the weight is not above 0, or `until` no number from 0.
    """

    weight: float = 0.1
    until: float = 80.0

    def __post_init__(self) -> None:
        check_positive("weight", self.weight, "this ramp divides by it")
        check_non_negative("until", self.until, "epochs")

    def __call__(self, clock: Clock) -> float:
        """The weight at a position in the run."""
        return rampup_as_coded(clock.epoch, self.weight, self.until)
