"""Decoupled knowledge with ensemble learning on CIFAR-100 with the paper's numbers.

ResNet-32, 300 epochs, batch 128.

    accelerate launch recipes/dkel_cifar100.py
    accelerate launch recipes/dkel_cifar100.py --method pcl
    accelerate launch recipes/dkel_cifar100.py --data PATH --student cifar_resnet20 --epochs 12

Paper (Shao & Chen 2023, Table 1, ResNet-32 on CIFAR-100, best peer and epoch on the test set):
alone 71.28, PCL 74.14, DKEL 74.83. --protocol released is what its code does. Rows of Table 3, all
with the same weight: --parts none, decoupled, decaying, both. Reached here with the full schedule:
not yet run. Shorter runs: benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro
from accelerate import PartialState

from kdtoolkit import distill


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    student: str = "cifar_resnet32"
    method: str = "dkel"  # "pcl" is the same without a decoupled teacher and a decaying ensemble
    branches: int = 3  # copies of the last stage and the classifier
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    rate: float = 0.5  # decay of the ensemble's share, per epoch; DKEL alone
    init_steps: int = 1  # of the teacher, at learning rate 0.01; DKEL alone
    protocol: str = "paper"  # or "released", as in the authors' code; DKEL alone
    parts: str = "both"  # "none", "decoupled", "decaying": rows of Table 3; DKEL alone
    epochs: int = 300
    batch_size: int = 128  # images per step over all processes
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the run: epochs 150, 225 of 300
    weight_decay: float = 5e-4
    validation: str = "none"  # the paper reports the test set
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    output: str = "runs/dkel_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    names = ("rate", "init_steps", "protocol", "parts")
    own: dict[str, Any] = {name: getattr(cfg, name) for name in names}
    result = distill(
        None, cfg.student, cfg.dataset, data_path=cfg.data or None, train_limit=cfg.rows or None,
        method=cfg.method, branches=cfg.branches, epochs=cfg.epochs, batch_size=cfg.batch_size,
        optimizer="nesterov", lr=cfg.lr, weight_decay=cfg.weight_decay, scheduler="multistep",
        milestones=cfg.milestones, validation=cfg.validation, mixed_precision=cfg.precision,
        seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume, keep="all",
        **(own if cfg.method == "dkel" else {}),
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
