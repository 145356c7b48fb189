"""Which epoch and which network were best: on the validation split, where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kdtoolkit.data.dataset import Data
from kdtoolkit.trainer.epoch_evaluation import metric_name

if TYPE_CHECKING:
    from kdtoolkit.trainer.trainer import Trainer


class NetworkAccuracy(NamedTuple):
    """Accuracy of one network.

    Attributes:
        network: Its name.
        top1: Top-1 accuracy in percent.
    """

    network: str
    top1: float


def monitored_split(data: Data) -> str | None:
    """The split that chooses the best epoch; None, where there is none, takes the last epoch.

    Args:
        data: Data of the run.

    Returns:
        "val", or None.
    """
    return "val" if data.val is not None else None


def find_best_network(
    metrics: Mapping[str, float], split: str | None, networks: Sequence[str]
) -> NetworkAccuracy | None:
    """The network with the highest top-1 accuracy, the first of equals.

    Args:
        metrics: Numbers of an evaluation by `metric_name`.
        split: Split that chooses; None is none.
        networks: Names of the networks to choose from.

    Returns:
        The best network, or None where none was evaluated on the split.
    """
    if split is None:
        return None
    names = {network: metric_name(split, network, "top1") for network in networks}
    evaluated = [NetworkAccuracy(n, metrics[key]) for n, key in names.items() if key in metrics]
    return max(evaluated, key=lambda found: found.top1, default=None)


def update_best(run: Trainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """Remember the best network of a run after an evaluation.

    Args:
        run: The run; `run.best` is replaced where a network is better than all before.
        metrics: Numbers of the evaluation by `metric_name`.

    Returns:
        `metrics`, and "improved", 1.0 where the best network is better than all before, else 0.0;
        "monitored", its accuracy in percent.
    """
    best = find_best_network(metrics, run.config.monitor, run.export_candidates()[0])
    improved = best is not None and best.top1 > run.best.get("top1", -1.0)
    found = {**metrics, "improved": float(improved)}
    if best is not None:
        found["monitored"] = best.top1
        if improved:
            position = {"epoch": run.clock.epoch, "step": run.clock.step}
            run.best = position | {"top1": best.top1, "network": best.network}
    return found


def replace_lost_best(run: Trainer) -> None:
    """Take the epoch of the current weights as the best one, for the weights of that are lost.

    Args:
        run: The run; `run.best` is replaced. It is empty where this epoch was not evaluated.
    """
    position = {"epoch": run.clock.epoch, "step": run.clock.step}
    metrics = {
        metric_name(row["split"], row["network"], "top1"): row["top1"]
        for row in run.metrics_log.rows
        if row.get("event") == "eval" and position.items() <= row.items() and "top1" in row
    }
    found = find_best_network(metrics, run.config.monitor, run.export_candidates()[0])
    run.best = {}
    if found is not None:
        run.best = position | {"top1": found.top1, "network": found.network}
