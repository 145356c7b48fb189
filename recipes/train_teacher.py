"""A teacher from labels alone: one-cycle, Nesterov, batch 128.

What it writes is a teacher for every other recipe.

    accelerate launch recipes/train_teacher.py --model cifar_resnet56 --dataset cifar100 --epochs 40
    accelerate launch recipes/srkd_cifar100.py --teacher runs/teacher/student

Reached here: not yet run for 40 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from accelerate import PartialState

from kdtoolkit.reproduce.recipes import distill_seeds, print_results


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    model: str = "cifar_resnet56"
    shortcut: str = "B"  # ResNets only
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    epochs: int = 40
    batch_size: int = 128  # images per step over all processes
    lr: float = 0.2  # the peak of the cycle
    weight_decay: float = 5e-4
    validation: str = "none"  # or "auto": 10 % of the training rows choose the epoch
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/teacher"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    results = distill_seeds(
        cfg.seeds, None, cfg.model, cfg.dataset, data_path=cfg.data or None, method="none",
        epochs=cfg.epochs, batch_size=cfg.batch_size, optimizer="nesterov", lr=cfg.lr,
        weight_decay=cfg.weight_decay, scheduler="onecycle", validation=cfg.validation,
        mixed_precision=cfg.precision, seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume,
        student_args={"shortcut": cfg.shortcut} if "resnet" in cfg.model else None,
        label=cfg.model,
    )  # fmt: skip
    print_results(results, ["top1"])
    if PartialState().is_main_process:
        print(f"as a teacher: --teacher {results[0].output_dir}/student")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
