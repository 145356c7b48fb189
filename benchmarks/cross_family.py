"""Teacher and student of different families on CIFAR-10: plain training and four methods.

    python benchmarks/cross_family.py --data PATH --teacher-weights PATH.safetensors

Two pairs at 32 pixels: a convolutional teacher and a small ViT (AdamW, lr 1e-3), and a small Swin,
trained here first on all training images, and a ResNet-8 (Nesterov, lr 0.1). All arms have the same
budget. Students see --rows training images, drawn by class, in batches of 64 (the Swin 128); one
epoch of warm-up, cosine, crop and flip, last epoch, test set. KD is CE + KD, weights 1 and 1, so
that SRKD differs from it in nothing but its own term; fitnet and at have the methods' own weights
(100 and 1000), fitnet1 and at10 a hundredth of them. An arm that has a result is not run again, an
interrupted one is resumed. The table is written to --table; its part "What they say" is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kdtoolkit import distill

METHODS: dict[str, dict[str, Any]] = {
    "none": dict(method="none"),
    "kd": dict(method="kd", losses={"ce": 1.0, "kd": 1.0}),
    "fitnet": dict(method="fitnet"),
    "at": dict(method="at"),
    "fitnet1": dict(method="fitnet", losses={"ce": 1.0, "fitnet": 1.0}),
    "at10": dict(method="at", losses={"ce": 1.0, "at": 10.0}),
    "srkd": dict(method="srkd", losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1}),
}
ADAMW: dict[str, Any] = dict(optimizer="adamw", lr=1e-3, weight_decay=0.05)
NESTEROV: dict[str, Any] = dict(optimizer="nesterov", lr=0.1, weight_decay=5e-4)
VIT = dict(img_size=32, patch_size=4, depth=4, embed_dim=64, num_heads=2)
SWIN = dict(
    img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2, 2), num_heads=(2, 4, 8)
)
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "swin-resnet8": ("cifar_resnet8", {}, NESTEROV),
    "resnet56-vit": ("vit_tiny_patch16_224", VIT, ADAMW),
}


def final(folder: Path) -> dict[str, Any] | None:
    """What a finished run measured at its end."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = next((row for row in rows if row["event"] == "final"), None)
    speeds = [row["images_per_s"] for row in rows if row["event"] == "train"]
    return found and found | {"images_per_s": statistics.median(speeds), "folder": folder}


def train(
    args: argparse.Namespace, folder: Path, teacher: Any, student: str, **options: Any
) -> dict[str, Any]:
    """The result of one arm, run unless its folder has it."""
    done = final(folder)
    if done is None:
        distill(
            teacher,
            student,
            "cifar10",
            data_path=args.data,
            scheduler="cosine",
            warmup_epochs=1,
            validation="none",
            eval_every=3,
            mixed_precision=args.precision,
            output_dir=folder,
            resume="auto",
            report_to="none",
            label=folder.name,
            progress="lines",
            **options,
        )
        done = final(folder)
    assert done is not None
    return done


def run(args: argparse.Namespace) -> None:
    runs = Path(args.output)
    for pair in args.pairs:
        teacher, (student, student_args, rule) = args.teacher_weights, STUDENTS[pair]
        if pair == "swin-resnet8":
            options: dict[str, Any] = dict(
                method="none", epochs=args.teacher_epochs, batch_size=128, **ADAMW
            )
            architecture = SWIN | {"drop_path_rate": 0.0}
            folder = runs / f"swin-e{args.teacher_epochs}"
            train(
                args,
                folder,
                None,
                "swin_tiny_patch4_window7_224",
                student_args=architecture,
                **options,
            )
            teacher = str(folder / "student")
        for seed in args.seeds:
            for name, method in ((m, METHODS[m]) for m in args.methods):
                train(
                    args,
                    runs / f"{pair}-{name}-r{args.rows}-e{args.epochs}-s{seed}",
                    None if name == "none" else teacher,
                    student,
                    student_args=student_args,
                    epochs=args.epochs,
                    batch_size=64,
                    train_limit=args.rows,
                    seed=seed,
                    **rule,
                    **method,
                )
                table(args)


def table(args: argparse.Namespace) -> None:
    """Every finished arm, one table a pair and budget."""
    groups: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for folder in sorted(Path(args.output).glob("*-r*-e*-s*")):
        done, (name, rows, epochs, _) = final(folder), folder.name.rsplit("-", 3)
        if done is not None:
            pair, method = name.rsplit("-", 1)
            groups.setdefault((pair, int(rows[1:]), int(epochs[1:])), {}).setdefault(
                method, []
            ).append(done)
    lines = ["# Pairs of different families", "", (__doc__ or "").strip().split("\n\n", 1)[1], ""]
    for (pair, rows, epochs), arms in groups.items():
        lines += [
            f"## {pair}: student {STUDENTS[pair][0]}, {rows} training images, {epochs} epochs, "
            "last epoch",
            "",
        ]
        lines += [_origin(pair, rows, epochs, [f for found in arms.values() for f in found]), ""]
        lines += [
            "| method | n | top-1 % | per seed | agreement % | images/s (median) |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(method, arms[method]) for method in METHODS if method in arms]
        lines.append("")
    out, mark = Path(args.table), "\n## What they say\n"
    old = out.read_text() if out.exists() else ""
    out.write_text("\n".join(lines) + (mark + old.split(mark, 1)[1] if mark in old else ""))
    print("\n".join(lines), flush=True)


def _row(name: str, found: list[dict[str, Any]]) -> str:
    tops, agree = [f["top1"] for f in found], [f["agreement"] for f in found if "agreement" in f]
    spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
    agreement = f"{statistics.mean(agree):.2f}" if agree else ""
    speed = statistics.median(f["images_per_s"] for f in found)
    each = ", ".join(f"{top:.2f}" for top in tops)
    top1 = f"{statistics.mean(tops):.2f}{spread}"
    return f"| {name} | {len(tops)} | {top1} | {each} | {agreement} | {speed:.0f} |"


def _origin(pair: str, rows: int, epochs: int, found: list[dict[str, Any]]) -> str:
    """Teacher, command and machine of a table."""
    teacher = next(
        (f"Teacher top-1 {f['teacher_top1']:.2f} %. " for f in found if "teacher_top1" in f), ""
    )
    env = json.loads((found[0]["folder"] / "env.json").read_text())
    packages = ", ".join(f"{p} {env['packages'][p]}" for p in ("torch", "timm"))
    return (
        f"{teacher}`python benchmarks/cross_family.py --pairs {pair} --rows {rows} "
        f"--epochs {epochs} --seeds ... --data ... --teacher-weights ...`; "
        f"{env['device']}, {packages}, {env['threads']} thread(s) a run; "
        "images/s depend on what else ran on the machine"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=None, help="a local copy of CIFAR-10; default the Hub")
    parser.add_argument(
        "--teacher-weights", required=True, help="a CIFAR-10 ResNet, for instance ResNet-56"
    )
    parser.add_argument("--pairs", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", type=int, default=10000, help="training images of the students")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--teacher-epochs", type=int, default=8, help="epochs of the Swin, on all training images"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output", default="runs/cross_family", help="folder of the runs")
    parser.add_argument("--table", default="benchmarks/results/cross_family.md")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
