"""SRKD on CIFAR-100 with the paper's numbers.

ResNet-56 -> ResNet-20, 180 epochs, batch 64, lr 0.05.

    accelerate launch recipes/srkd_cifar100.py --teacher PATH.safetensors
    accelerate launch recipes/srkd_cifar100.py --teacher runs/teacher/student --epochs 12

Paper (Chen & Sun 2024, Table 1, CIFAR-100): teacher 72.32, student alone 69.06, KD 70.66, SRKD
71.84. Reached here with the full schedule: not yet run. Shorter runs:
benchmarks/results/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from kdtoolkit.reproduce.recipes import distill_seeds, print_results


@dataclass(frozen=True)
class Config:
    """Numbers of the recipe, with their units."""

    teacher: str = ""  # PATH.safetensors, a folder that kdtoolkit wrote, or hf-hub:ID
    student: str = "cifar_resnet20"
    shortcut: str = "B"  # of the student: "A" without parameters, "B" 1x1 convolution
    dataset: str = "cifar100"
    data: str = ""  # local copy of the data set; default the Hub
    rows: int = 0  # training images to use, drawn by class; 0 is all
    method: str = "srkd"  # "none" trains the student alone
    weight: float = 0.1  # lambda, the weight of SRKD; no unit, best between 0.05 and 0.1
    temperature: float = 4.0  # no unit
    detach: bool = True  # False: gradients flow through the teacher's stage
    epochs: int = 180
    batch_size: int = 64  # images per step over all processes
    lr: float = 0.05
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)  # shares: epochs 90, 120, 150 of 180
    validation: str = "none"  # the paper reports the test set at the end of training
    precision: str = "no"  # "bf16", "fp16"
    seed: int = 0
    seeds: int = 1  # runs, with seeds from `seed` on
    output: str = "runs/srkd_cifar100"
    resume: str = "auto"
    baseline: str = ""  # folder of the student trained alone, shown in the report


def main(cfg: Config) -> None:
    """Run the recipe."""
    srkd = (
        {"losses": {"ce": 1.0, "kd": 1.0, "srkd": cfg.weight}, "detach": cfg.detach}
        if cfg.method == "srkd"
        else {}
    )
    if cfg.method != "none" and not cfg.teacher:
        raise ValueError(
            "--teacher is missing: give weights, or train some with recipes/train_teacher.py"
        )
    results = distill_seeds(
        cfg.seeds, cfg.teacher if cfg.method != "none" else None, cfg.student, cfg.dataset,
        data_path=cfg.data or None, train_limit=cfg.rows or None, method=cfg.method,
        temperature=cfg.temperature, epochs=cfg.epochs, batch_size=cfg.batch_size, lr=cfg.lr,
        weight_decay=cfg.weight_decay, scheduler="multistep", milestones=cfg.milestones,
        validation=cfg.validation, mixed_precision=cfg.precision, seed=cfg.seed,
        output_dir=cfg.output, resume=cfg.resume, baseline=cfg.baseline or None, **srkd,
        student_args={"shortcut": cfg.shortcut} if "resnet" in cfg.student else None,
    )  # fmt: skip
    plain = {k for r in results for k, v in r.metrics.items() if isinstance(v, (int, float, str))}
    print_results(results, [name for name in results[0].metrics if name in plain])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
