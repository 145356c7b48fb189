"""Teacher, student alone and the student with SRKD in a minute, without any download.

    python recipes/srkd_digits.py
    python recipes/srkd_digits.py --seeds 3

Data: scikit-learn's 1,797 handwritten digits. The teacher learns from all 1,297 training images;
both students see the same 400 of them, which is where a teacher helps most. Numbers are of the last
epoch on the 500 test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from kdtoolkit import DistillResult, distill
from kdtoolkit.reproduce.recipes import seed_folders
from kdtoolkit.reproduce.show import mean_and_deviation


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    teacher: str = "cifar_resnet20"
    student: str = "cifar_resnet8"
    method: str = "srkd"
    rows: int = 400  # training images of the students, the same for both
    teacher_epochs: int = 15
    epochs: int = 15  # of both students
    batch_size: int = 64  # images per step over all processes
    lr: float = 0.1
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/srkd_digits"
    overwrite: bool = False


def run(cfg: Config, seed: int, output: Path) -> dict[str, DistillResult]:
    """Teacher and both students with one seed."""
    shared = {
        "train_data": "digits",
        "batch_size": cfg.batch_size,
        "optimizer": "nesterov",
        "lr": cfg.lr,
        "warmup_epochs": 1,
        "validation": "none",
        "seed": seed,
        "resume": False if cfg.overwrite else "auto",
        "overwrite": cfg.overwrite,
        "log_every": 5,
    }
    students = shared | {"epochs": cfg.epochs, "train_limit": cfg.rows}
    teacher = distill(
        None, cfg.teacher, method="none", epochs=cfg.teacher_epochs,
        output_dir=output / "teacher", label="teacher", **shared,
    )  # fmt: skip
    alone = distill(
        None, cfg.student, method="none", output_dir=output / "alone", label="student alone",
        **students,
    )  # fmt: skip
    student = distill(
        output / "teacher" / "student", cfg.student, method=cfg.method,
        output_dir=output / "distilled", baseline=alone, label=f"student {cfg.method}",
        **students,
    )  # fmt: skip
    return {"teacher": teacher, "student alone": alone, f"student with {cfg.method}": student}


def main(cfg: Config) -> None:
    """Run the recipe."""
    torch.set_num_threads(1)  # digits are 16x16: a second thread waits more than it works
    folders = seed_folders(cfg.seeds, cfg.seed, cfg.output)
    runs = [run(cfg, seed, folder) for seed, folder in folders.items()]
    if not PartialState().is_main_process:
        return
    table = Table("network", "parameters", "top-1 %", title="digits, 500 test images, last epoch")
    for name in runs[0]:
        found = [results[name].metrics for results in runs]
        table.add_row(name, f"{found[0]['params']:,}", mean_and_deviation(found, "top1"))
    Console().print(table)
    for folder in folders.values():
        print(f"results: {folder}/distilled/report.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
