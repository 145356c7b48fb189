"""Fine-tuning with distillation: CIFAR-10 from 1,000 images, in three arms.

The networks are pre-trained on CIFAR-100.

    accelerate launch recipes/finetune_kd.py
    accelerate launch recipes/finetune_kd.py --teacher PATH --seeds 3 --precision bf16

The arms have the same images, epochs and seed: the student from scratch, the pre-trained student
fine-tuned alone, and the pre-trained student distilled from the pre-trained teacher, which gets a
new head and is fine-tuned on the same images first. The fine-tuned teacher lies in OUTPUT/teachers,
for every further student. A second start finds all done. Reached here with the second command
(ResNet-56 of 70.3 % and ResNet-20 of 52.1 % on CIFAR-100; one CPU thread, last epoch, n = 3):
scratch 45.46 ± 1.57, alone 68.31 ± 0.90, distilled 72.10 ± 0.55, teacher 77.07 ± 0.16. With the
default teacher: not yet run.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import tyro
from accelerate import PartialState

from kdtoolkit import DistillResult, distill
from kdtoolkit.models.loading import is_timm_name


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    student: str = "cifar_resnet20"  # timm name
    student_weights: str = ""  # pre-trained: folder, .safetensors, .pth; default: trained here
    teacher: str = "cifar_resnet32"  # timm name (pre-trained here), folder, .safetensors, Hub id
    source: str = "cifar100"  # data set to pretrain on
    source_data: str = ""  # local copy of it; default the Hub
    source_rows: int = 0  # of its training images, drawn by class; 0 is all
    source_epochs: int = 6
    source_lr: float = 0.2  # the peak of the cycle
    dataset: str = "cifar10"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 1000  # training images to fine-tune on, drawn by class from the seed
    epochs: int = 30
    batch_size: int = 50  # images per step over all processes
    lr: float = 0.02  # of what is pretrained
    scratch_lr: float = 0.05
    method: str = "kd"
    teacher_head: str = "finetune"  # or "linear-probe"
    allow_weak_teacher: bool = False  # go on with a teacher that is near chance
    layer_decay: float = 1.0  # factor of the rate from one layer to the next towards the image
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs of every arm, with seeds from `seed` on
    output: str = "runs/finetune_kd"
    resume: str = "auto"


def pretrained(cfg: Config, name: str) -> str:
    """The folder of a network that was trained on the source data, now or earlier."""
    result = distill(
        None, name, cfg.source, data_path=cfg.source_data or None,
        train_limit=cfg.source_rows or None, method="none", epochs=cfg.source_epochs,
        optimizer="nesterov", lr=cfg.source_lr, scheduler="onecycle", validation="none",
        eval_every=cfg.source_epochs, mixed_precision=cfg.precision,
        output_dir=f"{cfg.output}/pretrained/{name}", resume=cfg.resume,
        label=f"{name} on {cfg.source}",
    )  # fmt: skip
    return f"local-dir:{result.output_dir}/student"


def tune(
    cfg: Config, seed: int, arm: str, teacher: str | None, student: str, **options: object
) -> DistillResult:
    """One arm on the small data; the last epoch counts."""
    given = {
        "lr": cfg.lr,
        "layer_decay": cfg.layer_decay if cfg.layer_decay < 1 else None,
    } | options
    return distill(
        teacher, student, cfg.dataset, data_path=cfg.data or None, train_limit=cfg.rows or None,
        epochs=cfg.epochs, batch_size=cfg.batch_size, validation="none", eval_every=cfg.epochs,
        mixed_precision=cfg.precision, seed=seed, output_dir=f"{cfg.output}/{arm}/seed{seed}",
        resume=cfg.resume, label=arm, **given,
    )  # fmt: skip


def main(cfg: Config) -> None:
    """Run the recipe."""
    teacher = pretrained(cfg, cfg.teacher) if is_timm_name(cfg.teacher) else cfg.teacher
    student = cfg.student if cfg.student_weights else pretrained(cfg, cfg.student)
    weights = {"student_weights": cfg.student_weights or None}
    taught = {
        "method": cfg.method,
        "teacher_head": cfg.teacher_head,
        "allow_weak_teacher": cfg.allow_weak_teacher,
        "teacher_dir": f"{cfg.output}/teachers",
    }
    arms = {
        "scratch": (
            None,
            cfg.student,
            {"method": "none", "lr": cfg.scratch_lr, "layer_decay": None},
        ),
        "alone": (None, student, {"method": "none", **weights}),
        "distilled": (teacher, student, taught | weights),
    }
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    found = {
        arm: [tune(cfg, seed, arm, *nets, **own).metrics for seed in seeds]
        for arm, (*nets, own) in arms.items()
    }
    if PartialState().is_main_process:
        rows = {arm: [m["top1"] for m in metrics] for arm, metrics in found.items()}
        rows["teacher"] = [m["teacher_top1"] for m in found["distilled"]]
        rows_used = f"{cfg.rows or 'all'} training images"
        print(f"\ntop-1 on the test set of {cfg.dataset}, last epoch, {rows_used}, %")
        for arm, tops in rows.items():
            spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
            where = f"{cfg.output}/{'teachers' if arm == 'teacher' else arm}"
            print(f"  {arm:10} {statistics.mean(tops):6.2f}{spread}  n = {len(tops)}  {where}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
