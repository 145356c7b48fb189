"""Deep mutual learning on CIFAR-100 with the paper's numbers.

Two ResNet-32, 200 epochs, batch 64, lr 0.1.

    accelerate launch recipes/dml_cifar100.py
    accelerate launch recipes/dml_cifar100.py --data PATH --student cifar_resnet20 --epochs 12
    accelerate launch --num_processes 2 recipes/dml_cifar100.py
    accelerate launch recipes/dml_cifar100.py --method none --seeds 3

Paper (Zhang et al. 2018, Table 2, as we remember it, unverified): ResNet-32 alone 68.99, two of
them 71.19 and 70.75. PCL's table of 2021 has 73.68 ± 0.14 for DML with ResNet-32 in a schedule of
300 epochs. --method takes every strategy without a teacher, and none, the baseline; options that a
method does not have are not passed. Reached here with the full schedule: not yet run. Shorter runs:
benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from kdtoolkit.reproduce.recipes import distill_seeds, options_for, print_results


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    student: str = "cifar_resnet32"
    method: str = "dml"  # "dcl", "one", ...; "none" trains one network alone
    peers: int | None = None  # networks or branches, the student among them; of dml 2
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    weight: float = 1.0  # of the mutual loss of dml; 0 trains every network alone
    temperature: float | None = None  # no unit; None is the method's own, of dml 1
    target: str = "pairwise"  # or "ensemble": the mean of the others' logits; dml alone
    epochs: int = 200
    batch_size: int = 64  # images per step over all processes
    lr: float = 0.1
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)  # shares of the run: epochs 60, 120, 180 of 200
    validation: str = "none"  # the paper reports the test set at the end of training
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/dml_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    options = options_for(
        cfg.method, networks=cfg.peers, temperature=cfg.temperature, target=cfg.target,
    )  # fmt: skip
    losses = {"ce": 1.0, "mutual": cfg.weight} if cfg.method == "dml" else None
    results = distill_seeds(
        cfg.seeds, None, cfg.student, cfg.dataset, data_path=cfg.data or None,
        train_limit=cfg.rows or None, method=cfg.method, losses=losses, **options,
        epochs=cfg.epochs, batch_size=cfg.batch_size, optimizer="nesterov", lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        scheduler="multistep", milestones=cfg.milestones, validation=cfg.validation,
        mixed_precision=cfg.precision, seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume,
        keep="all",
    )  # fmt: skip
    print_results(results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
