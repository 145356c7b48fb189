"""Decoupled knowledge with ensemble learning on CIFAR-100 with the paper's numbers.

ResNet-32, 300 epochs, batch 128.

    accelerate launch recipes/dkel_cifar100.py
    accelerate launch recipes/dkel_cifar100.py --method pcl
    accelerate launch recipes/dkel_cifar100.py --method none --seeds 3
    accelerate launch recipes/dkel_cifar100.py --data PATH --student cifar_resnet20 --epochs 12

Paper (Shao & Chen 2023, Table 1, ResNet-32 on CIFAR-100, best peer and epoch on the test set):
alone 71.28, PCL 74.14, DKEL 74.83. --protocol released is what its code does. Rows of Table 3, all
with the same weight: --parts none, decoupled, decaying, both. --method takes every strategy without
a teacher, and none, the baseline; options that a method does not have are not passed. Reached here
with the full schedule: not yet run. Shorter runs: benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from kdtoolkit.reproduce.recipes import distill_seeds, options_for, print_results


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    student: str = "cifar_resnet32"
    method: str = "dkel"  # "pcl", "one", "dml", ...; "none" trains one network alone
    branches: int = 3  # copies of the last stage and the classifier, or whole networks (peers)
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
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/dkel_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    options = options_for(
        cfg.method, networks=cfg.branches, rate=cfg.rate, init_steps=cfg.init_steps,
        protocol=cfg.protocol, parts=cfg.parts,
    )  # fmt: skip
    results = distill_seeds(
        cfg.seeds, None, cfg.student, cfg.dataset, data_path=cfg.data or None,
        train_limit=cfg.rows or None, method=cfg.method, **options, epochs=cfg.epochs,
        batch_size=cfg.batch_size, optimizer="nesterov", lr=cfg.lr, weight_decay=cfg.weight_decay,
        scheduler="multistep",
        milestones=cfg.milestones, validation=cfg.validation, mixed_precision=cfg.precision,
        seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume, keep="all",
    )  # fmt: skip
    print_results(results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
