"""The numbers of a training loop."""

from __future__ import annotations

from dataclasses import dataclass

from kdtoolkit.schedules import SCHEDULERS
from kdtoolkit.utils.validation import (
    check_choice,
    check_flag,
    check_fraction,
    check_number,
    check_positive,
    check_whole_number,
    describe_value,
)

# momentum SGD with weight decay on every parameter, as in the papers
PAPER_OPTIMIZERS = {"sgd": "momentum", "momentum": "momentum", "nesterov": "nesterov"}

EVAL_TEST = ("auto", "every", "end")
MAX_RATE = 1e6  # of learning rate and weight decay; more only overflows
MAX_SEED = 2**32 - 1024  # NumPy's limit, less the ranks that are added to it


@dataclass(frozen=True)
class TrainerConfig:
    """Numbers of a training loop, every default resolved. Validated when it is made.

    Attributes:
        epochs: Passes over the training data; None where `max_steps` is given.
        max_steps: Optimizer steps; None where `epochs` is given.
        batch_size: Images per optimizer step, over all processes and accumulation steps.
        optimizer: `"sgd"` (momentum without Nesterov) and `"nesterov"` decay every parameter, as in
            the papers; other names are timm's, without decay on biases and norms.
        lr: Learning rate, the highest of the schedule.
        weight_decay: Weight decay.
        momentum: Momentum, from 0 to below 1.
        layer_decay: Factor of the learning rate from one layer to the next towards the image, above
            0 to 1; None is the same rate everywhere.
        scheduler: Learning rate over time: "cosine", "multistep", "onecycle", "linear" or
            "constant".
        milestones: Shares of the run at which "multistep" lowers the rate.
        gamma: Factor of the learning rate at each of them.
        warmup_epochs: Epochs, or a part of one, in which the learning rate rises from 0.
        grad_accum: Forward and backward passes that share one optimizer step.
        grad_clip: Largest norm of the gradient; None is no clipping.
        channels_last: Memory layout of images and weights.
        compile: Whether networks are compiled.
        seed: Of data order, augmentation and dropout.
        log_every: Batches between two rows of losses.
        eval_every: Epochs between two evaluations; the last epoch is always evaluated.
        monitor: Split that chooses the best epoch; None takes the last.
        eval_test: Evaluate the test set at "every" evaluation or at the "end"; "auto" is "end"
            where a validation split chooses.
    """

    epochs: int | None = 10
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    layer_decay: float | None = None
    scheduler: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    grad_accum: int = 1
    grad_clip: float | None = None
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1
    monitor: str | None = "val"
    eval_test: str = "auto"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs={self.epochs} and max_steps={self.max_steps}: give one of them"
            )
        if self.epochs is not None:
            check_whole_number("epochs", self.epochs)
        if self.max_steps is not None:
            check_whole_number("max_steps", self.max_steps)
        check_whole_number("batch_size", self.batch_size, meaning="images per optimizer step")
        check_whole_number("grad_accum", self.grad_accum)
        check_whole_number("log_every", self.log_every, meaning="batches")
        check_whole_number("eval_every", self.eval_every, meaning="epochs")
        if not isinstance(self.optimizer, str):
            raise ValueError(
                f"optimizer is {self.optimizer!r}: give its name, 'sgd', 'nesterov' or one of "
                "timm.optim.list_optimizers()"
            )
        check_number("lr", self.lr, minimum=0, maximum=MAX_RATE)
        if self.lr == 0:
            raise ValueError("lr is 0: nothing would be trained; give a number above 0")
        check_number("weight_decay", self.weight_decay, minimum=0, maximum=MAX_RATE)
        check_number("warmup_epochs", self.warmup_epochs, minimum=0, maximum=1e6, meaning="epochs")
        check_number("gamma", self.gamma, minimum=0, maximum=MAX_RATE)
        check_number("momentum", self.momentum, minimum=0, below=1)
        if self.layer_decay is not None:
            check_number(
                "layer_decay", self.layer_decay, above=0, maximum=1,
                meaning="factor of the learning rate from one layer to the next towards the image; "
                "None is the same rate everywhere",
            )  # fmt: skip
        if self.grad_clip is not None:
            check_positive("grad_clip", self.grad_clip, "largest norm of the gradient")
        check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_choice("eval_test", self.eval_test, EVAL_TEST)
        if not isinstance(self.milestones, (list, tuple)):
            raise ValueError(
                f"milestones is {describe_value(self.milestones)}; allowed: a list of shares of "
                "the run, such as [0.5, 0.75]"
            )
        check_choice("monitor", self.monitor, (None, "val", "test"))
        for milestone in self.milestones:
            check_fraction("a milestone", milestone, "share of the run, as in [0.5, 0.75]")
        check_whole_number("seed", self.seed, minimum=0, maximum=MAX_SEED)
        check_flag("compile", self.compile)
        check_flag("channels_last", self.channels_last)
