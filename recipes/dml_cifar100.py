"""Deep mutual learning on CIFAR-100 with the paper's numbers.

Two ResNet-32, 200 epochs, batch 64, lr 0.1.

    accelerate launch recipes/dml_cifar100.py
    accelerate launch recipes/dml_cifar100.py --data PATH --student cifar_resnet20 --epochs 12
    accelerate launch --num_processes 2 recipes/dml_cifar100.py

Paper (Zhang et al. 2018, Table 2, as we remember it, unverified): ResNet-32 alone 68.99, two of
them 71.19 and 70.75. PCL's table of 2021 has 73.68 ± 0.14 for DML with ResNet-32 in a schedule of
300 epochs. Reached here with the full schedule: not yet run. Shorter runs:
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

    student: str = "cifar_resnet32"
    peers: int = 2  # networks, the student among them
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    weight: float = 1.0  # of the mutual loss; 0 trains every network alone
    temperature: float = 1.0  # no unit
    target: str = "pairwise"  # or "ensemble": the mean of the others' logits
    epochs: int = 200
    batch_size: int = 64  # images per step over all processes
    lr: float = 0.1
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)  # shares of the run: epochs 60, 120, 180 of 200
    validation: str = "none"  # the paper reports the test set at the end of training
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    output: str = "runs/dml_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    result = distill(
        None, cfg.student, cfg.dataset, data_path=cfg.data or None, train_limit=cfg.rows or None,
        method="dml", peers=cfg.peers, losses={"ce": 1.0, "mutual": cfg.weight},
        temperature=cfg.temperature, target=cfg.target, epochs=cfg.epochs,
        batch_size=cfg.batch_size, optimizer="nesterov", lr=cfg.lr, weight_decay=cfg.weight_decay,
        scheduler="multistep", milestones=cfg.milestones, validation=cfg.validation,
        mixed_precision=cfg.precision, seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume,
        keep="all",
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
