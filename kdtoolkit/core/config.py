"""The numbers of a run, and what they make: the loader, the clock, the optimizer and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdtoolkit import schedules

# momentum SGD with weight decay on every parameter, as in the papers
PAPER_OPTIMIZERS = {"sgd": "momentum", "momentum": "momentum", "nesterov": "nesterov"}
# arguments of distill() that a run shares with those it starts: a baseline, the fine-tuning of a teacher
SHARED = (
    "epochs max_steps batch_size optimizer lr weight_decay scheduler warmup_epochs report_to mixed_precision "
    "grad_accum compile channels_last grad_clip seed progress momentum milestones gamma log_every eval_every eval_test"
).split()


@dataclass(frozen=True)
class TrainerConfig:
    """Numbers of a run. Lengths in epochs or optimizer steps, `batch_size` images per optimizer step over all ranks."""

    epochs: int | None = 10
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: str = (
        "sgd"  # momentum 0.9 without Nesterov, decay on every parameter, as in the papers
    )
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    layer_decay: float | None = (
        None  # factor of the learning rate from one layer to the next towards the image
    )
    scheduler: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)  # shares of the run, for "multistep"
    gamma: float = 0.1  # factor of the learning rate at each of them
    warmup_epochs: float = 0.0
    grad_accum: int = 1
    grad_clip: float | None = None  # largest norm of the gradient
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50  # batches
    eval_every: int = 1  # epochs
    monitor: str | None = "val"  # split that chooses the best epoch; None takes the last
    eval_test: str = (
        "auto"  # "every" epoch or at the "end"; "auto" is "end" where a validation split chooses
    )

    def __post_init__(self) -> None:
        free = dict.fromkeys(("lr", "weight_decay", "warmup_epochs", "gamma"), math.inf)
        for name, most in {**free, "momentum": 1}.items():
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(
                    f"{name} is {number!r}, a {type(number).__name__}; it must be a number"
                )
            if not 0 <= number < most:
                allowed = "from 0 to below 1" if most == 1 else "a finite number from 0"
                raise ValueError(f"{name} is {number!r}; allowed: {allowed}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TrainerConfig:
        """From the arguments of distill(), each checked."""
        epochs, max_steps, papers = (
            given["epochs"],
            given["max_steps"],
            given["optimizer"] in PAPER_OPTIMIZERS,
        )
        if epochs is not None and max_steps is not None:
            raise ValueError(f"epochs={epochs} and max_steps={max_steps}: give one of them")
        epochs = 30 if epochs is None and max_steps is None else epochs
        whole = {"epochs": epochs, "max_steps": max_steps}
        whole |= {n: given[n] for n in ("batch_size", "grad_accum", "log_every", "eval_every")}
        _check(given, whole)
        same = "optimizer momentum gamma scheduler warmup_epochs grad_clip compile seed eval_test layer_decay".split()
        settings = cls(
            lr=(0.05 if papers else 1e-3) if given["lr"] is None else given["lr"],
            weight_decay=(5e-4 if papers else 0.05)
            if given["weight_decay"] is None
            else given["weight_decay"],
            milestones=tuple(given["milestones"]),
            **whole,
            **{name: given[name] for name in same},
        )
        return settings


def _check(given: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """ValueError for a value that is not allowed; `whole` must be whole numbers from 1, or None."""
    for name, number in whole.items():
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int) or number < 1
        ):
            raise ValueError(f"{name} is {number!r}, it must be a whole number from 1")
    if given["scheduler"] not in schedules.SCHEDULERS:
        raise ValueError(
            f"unknown scheduler {given['scheduler']!r}; known: {', '.join(schedules.SCHEDULERS)}"
        )
    if given["eval_test"] not in ("auto", "every", "end"):
        raise ValueError(f"eval_test is {given['eval_test']!r}; allowed: 'auto', 'every', 'end'")
    if given["grad_clip"] is not None and not given["grad_clip"] > 0:
        raise ValueError(
            f"grad_clip is {given['grad_clip']!r}: the largest norm of the gradient, above 0"
        )
    decay = given["layer_decay"]
    if decay is not None and (isinstance(decay, (bool, str)) or not 0 < decay <= 1):
        raise ValueError(
            f"layer_decay is {decay!r}: the factor of the learning rate from one layer to the next towards the image, "
            "above 0 and at most 1; None is the same rate everywhere"
        )
