"""Deep communication learning on CIFAR-100 with the numbers of the released code.

Two WRN-16-4, 200 epochs, batch 128, lr 0.001.

    accelerate launch recipes/dcl_cifar100.py
    accelerate launch --num_processes 2 recipes/dcl_cifar100.py
    accelerate launch recipes/dcl_cifar100.py --data PATH --student cifar_resnet20 --epochs 12

Paper (Zhang et al. 2022, CIFAR-100, best network and epoch on the test set): WRN-16-4 alone 65.88,
two of them 69.32. Its text exchanges weights every T epochs, its code every 10 mini-batches; this
is the code. Reached here with the full schedule: not yet run. Shorter runs, other settings too:
benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from accelerate import PartialState

from kdtoolkit import distill


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    student: str = "cifar_wrn16_4"
    peers: int = 2  # networks, the student among them
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    every: int = 10  # mini-batches or epochs between two exchanges
    unit: str = "steps"  # or "epochs"
    beta: float = 0.1  # share of the common weights in an exchange, 0 to 1
    rule: str = "paper"  # "eps-free" (its limit), "mean" (plain average)
    statistics: str = "own"  # BatchNorm's after an exchange; "merged", "recalibrated"
    until: float = 1.0  # share of the run with exchanges; 0.5 gained more here
    views: bool = False  # True: every network has an augmentation of its own
    epochs: int = 200
    batch_size: int = 128  # images per step
    lr: float = 0.001
    gamma: float = 0.2  # factor of the learning rate at each milestone
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)  # shares of the run: epochs 61, 121, 161 of 200
    weight_decay: float = 5e-4
    validation: str = "none"  # the paper reports the test set
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    output: str = "runs/dcl_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    result = distill(
        None, cfg.student, cfg.dataset, data_path=cfg.data or None, train_limit=cfg.rows or None,
        method="dcl", peers=cfg.peers, every=cfg.every, unit=cfg.unit, beta=cfg.beta,
        rule=cfg.rule, statistics=cfg.statistics, until=cfg.until, views=cfg.views,
        epochs=cfg.epochs, batch_size=cfg.batch_size, optimizer="sgd", lr=cfg.lr, gamma=cfg.gamma,
        weight_decay=cfg.weight_decay, scheduler="multistep", milestones=cfg.milestones,
        validation=cfg.validation, mixed_precision=cfg.precision, seed=cfg.seed,
        output_dir=cfg.output, resume=cfg.resume, keep="all",
    )  # fmt: skip
    if PartialState().is_main_process:
        print(
            {
                k: v
                for k, v in result.metrics.items()
                if k in ("top1", "exported", "exported_reason", "networks")
            }
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
