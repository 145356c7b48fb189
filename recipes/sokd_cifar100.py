"""Semi-online distillation on CIFAR-100 with the paper's numbers.

WRN-40-2 -> WRN-16-2, 200 epochs, batch 128, lr 0.1.

    accelerate launch recipes/sokd_cifar100.py --teacher PATH.safetensors
    accelerate launch recipes/train_teacher.py --model cifar_wrn40_2 --output runs/teacher
    accelerate launch recipes/sokd_cifar100.py --teacher runs/teacher/student --epochs 12

Paper (Liu, Liu, Huang 2021): its table is not at hand. Reached here with the full schedule: not yet
run. Shorter runs: benchmarks/results/strategies.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from kdtoolkit.reproduce.recipes import distill_seeds, print_results


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    teacher: str = ""  # PATH.safetensors, a folder that kdtoolkit wrote, or hf-hub:ID
    student: str = "cifar_wrn16_2"
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    temperature: float = 4.0  # no unit
    teacher_mode: str = "eval"  # "train", as released: statistics of the batch in the targets
    start: str = "teacher"  # first weights of the branch; "random" as in the released code
    epochs: int = 200
    batch_size: int = 128  # images per step over all processes
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the run: epochs 100, 150 of 200
    weight_decay: float = 5e-4
    validation: str = "none"  # the last epoch is taken
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/sokd_cifar100"
    resume: str = "auto"


def main(cfg: Config) -> None:
    """Run the recipe."""
    if not cfg.teacher:
        raise ValueError(
            "--teacher is missing: give weights, or train some with recipes/train_teacher.py"
        )
    results = distill_seeds(
        cfg.seeds, cfg.teacher, cfg.student, cfg.dataset, data_path=cfg.data or None,
        train_limit=cfg.rows or None, method="sokd", temperature=cfg.temperature,
        teacher_mode=cfg.teacher_mode, start=cfg.start, epochs=cfg.epochs,
        batch_size=cfg.batch_size, lr=cfg.lr, weight_decay=cfg.weight_decay, scheduler="multistep",
        milestones=cfg.milestones, validation=cfg.validation, mixed_precision=cfg.precision,
        seed=cfg.seed, output_dir=cfg.output, resume=cfg.resume, keep="all",
    )  # fmt: skip
    print_results(results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
