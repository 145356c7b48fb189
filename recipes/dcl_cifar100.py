"""Deep communication learning on CIFAR-100 with the paper's numbers, or those of its code.

Two WRN-16-4, 200 epochs, batch 128.

    accelerate launch recipes/dcl_cifar100.py
    accelerate launch recipes/dcl_cifar100.py --protocol released --redraw head+stem
    accelerate launch recipes/dcl_cifar100.py --method none --seeds 3
    accelerate launch --num_processes 2 recipes/dcl_cifar100.py --batches own
    accelerate launch recipes/dcl_cifar100.py --data PATH --student cifar_resnet20 --epochs 12

Paper (Zhang et al. 2022, CIFAR-100, best network and epoch on the test set): WRN-16-4 alone 65.88,
two of them 69.32. Its text exchanges weights every T epochs and gives no T, its code every 10
mini-batches, as does this recipe. --method takes every strategy without a teacher, and none, the
baseline; options that a method does not have are not passed. Reached here with the full schedule:
not yet run. Shorter runs, other settings too: benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from kdtoolkit.models.loading import is_timm_name
from kdtoolkit.reproduce.recipes import (
    distill_seeds,
    options_for,
    print_results,
    protocol_settings,
)

PRETRAINED_LR = 0.001  # of networks that begin with given weights, in both protocols


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units; None is the protocol's, or the method's own."""

    student: str = "cifar_wrn16_4"
    method: str = "dcl"  # "dml", "one", ...; "none" trains one network alone
    protocol: str = "paper"  # or "released", as in the authors' code
    peers: int | None = None  # networks or branches, the student among them; of dcl 2
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    every: int = 10  # mini-batches or epochs between two exchanges
    unit: str = "steps"  # or "epochs"
    beta: float = 0.1  # share of the common weights in an exchange, 0 to 1
    rule: str | None = None  # of dcl "paper", "eps-free" (its limit), "mean" (plain average)
    statistics: str = "own"  # BatchNorm's after an exchange; "merged", "recalibrated"
    until: float = 1.0  # share of the run with exchanges; 0.5 gained more here
    batches: str = "shared"  # "own": every network draws its own images
    views: bool | None = None  # True: every network has an augmentation of its own
    redraw: str = "auto"  # "head", "head+stem": drawn anew in copies of a pre-trained student
    epochs: int | None = None  # 200
    batch_size: int | None = None  # 128 images per step (of every network, with its own batches)
    optimizer: str | None = None  # paper "nesterov", released "sgd"
    lr: float | None = None  # paper 0.1, released 0.001; of a pre-trained student 0.001
    gamma: float | None = None  # factor at each milestone; paper 0.1, released 0.2
    milestones: tuple[float, ...] | None = None  # shares; epochs 60, 120 and 180, released 160
    weight_decay: float | None = None  # paper 1e-4, released 5e-4
    validation: str = "none"  # the paper reports the test set
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/dcl_cifar100"
    resume: str = "auto"


def schedule(cfg: Config) -> dict[str, Any]:
    """The numbers of the protocol, but for those that were given."""
    is_pretrained = "." in cfg.student or not is_timm_name(cfg.student)
    lr = PRETRAINED_LR if cfg.lr is None and is_pretrained else cfg.lr
    names = ("epochs", "batch_size", "optimizer", "gamma", "milestones", "weight_decay")
    given = {name: getattr(cfg, name) for name in (*names, "validation")}
    return protocol_settings("dcl", cfg.protocol, lr=lr, **given)


def main(cfg: Config) -> None:
    """Run the recipe."""
    options = options_for(
        cfg.method, networks=cfg.peers, every=cfg.every, unit=cfg.unit, beta=cfg.beta,
        rule=cfg.rule, statistics=cfg.statistics, until=cfg.until,
        batches=cfg.batches, views=cfg.views, redraw=cfg.redraw,
    )  # fmt: skip
    results = distill_seeds(
        cfg.seeds, None, cfg.student, cfg.dataset, data_path=cfg.data or None,
        train_limit=cfg.rows or None, method=cfg.method, **options, **schedule(cfg),
        mixed_precision=cfg.precision, seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume,
        keep="all",
    )  # fmt: skip
    print_results(results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
