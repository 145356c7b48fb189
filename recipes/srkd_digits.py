"""Teacher, student alone and the student with SRKD in a minute, without any download.

    python recipes/srkd_digits.py

Data: scikit-learn's 1,797 handwritten digits. The teacher learns from all 1,297 training images;
both students see the same 400 of them, which is where a teacher helps most. Numbers are of the last
epoch on the 500 test images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from kdtoolkit import distill


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
    output: str = "runs/srkd_digits"
    overwrite: bool = False


def main(cfg: Config) -> None:
    """Run the recipe."""
    torch.set_num_threads(1)  # digits are 16x16: a second thread waits more than it works
    shared = {
        "train_data": "digits",
        "batch_size": cfg.batch_size,
        "optimizer": "nesterov",
        "lr": cfg.lr,
        "warmup_epochs": 1,
        "validation": "none",
        "seed": cfg.seed,
        "resume": False if cfg.overwrite else "auto",
        "overwrite": cfg.overwrite,
        "log_every": 5,
    }
    students = shared | {"epochs": cfg.epochs, "train_limit": cfg.rows}
    teacher = distill(
        None, cfg.teacher, method="none", epochs=cfg.teacher_epochs,
        output_dir=f"{cfg.output}/teacher", label="teacher", **shared,
    )  # fmt: skip
    alone = distill(
        None, cfg.student, method="none", output_dir=f"{cfg.output}/alone", label="student alone",
        **students
    )  # fmt: skip
    student = distill(
        f"{cfg.output}/teacher/student", cfg.student, method=cfg.method,
        output_dir=f"{cfg.output}/distilled", baseline=alone, label=f"student {cfg.method}",
        **students,
    )  # fmt: skip
    if not PartialState().is_main_process:
        return
    rows = {"teacher": teacher, "student alone": alone, f"student with {cfg.method}": student}
    table = Table("network", "parameters", "top-1 %", title="digits, 500 test images, last epoch")
    for name, result in rows.items():
        table.add_row(name, f"{result.metrics['params']:,}", f"{result.metrics['top1']:.2f}")
    Console().print(table)
    print(f"results: {cfg.output}/distilled/report.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
