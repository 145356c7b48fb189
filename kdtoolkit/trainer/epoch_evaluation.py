"""Evaluation before the first and after every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data.dataset import Data, Split

if TYPE_CHECKING:
    from kdtoolkit.trainer.trainer import Trainer


def splits_to_evaluate(config: TrainerConfig, data: Data, epoch: int, is_last: bool) -> list[Split]:
    """Splits that are evaluated after an epoch, the validation split first.

    Args:
        config: Says how often, and when the test split is evaluated.
        data: The splits.
        epoch: Finished epochs.
        is_last: Whether the run ends here; then every split is evaluated.
    """
    if not is_last and epoch % config.eval_every:
        return []
    no_validation = config.eval_test == "auto" and config.monitor != "val"
    test_is_due = is_last or config.eval_test == "every" or no_validation
    splits = [data.val, data.test if test_is_due else None]
    return [split for split in splits if split is not None]


def metric_name(split: str, network: str, metric: str) -> str:
    """`"val/top1"` for the student, `"val/peer1/top1"` for another network.

    Args:
        split: Name of the split, such as "val".
        network: Name of the network; "student" is left out.
        metric: Name of the metric, such as "top1".

    Returns:
        The parts, joined by "/".
    """
    return f"{split}/{metric}" if network == "student" else f"{split}/{network}/{metric}"


def evaluate_epoch(run: Trainer, is_last: bool) -> dict[str, float]:
    """Evaluate and log what is due after an epoch; all ranks call it.

    Args:
        run: The trainer, at the end of the epoch.
        is_last: Whether the run ends here.

    Returns:
        Metrics by `metric_name`.
    """
    clock = run.clock
    metrics: dict[str, float] = {}
    for split in splits_to_evaluate(run.config, run.data, clock.epoch, is_last):
        for network, row in run.evaluator.evaluate_networks(split).items():
            position = {"epoch": clock.epoch, "step": clock.step}
            run.metrics_log.add(event="eval", split=split.name, network=network, **position, **row)
            metrics |= {metric_name(split.name, network, key): v for key, v in row.items()}
    return metrics


def evaluate_teachers(run: Trainer) -> None:
    """Evaluate and log each teacher on every split; all ranks call it.

    A resumed run has the rows already; they are not logged twice.

    Args:
        run: The trainer, before the first epoch.
    """
    for name, split, metrics in run.evaluator.evaluate_teachers():
        key = {"event": "teacher", "network": name, "split": split}
        if not any(key.items() <= row.items() for row in run.metrics_log.rows):
            run.metrics_log.add(**key, epoch=0, step=0, **metrics)
