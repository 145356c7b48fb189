"""The same student alone, with KD and with SRKD: equal seeds, equal budget, last epoch, test set.

    python benchmarks/methods.py run --data cifar10 --data-path PATH --teacher PATH
    python benchmarks/methods.py table

`run` writes one folder per (data, method, seed) under --runs, skips what is finished and resumes
what is not. `table` reads the folders and writes benchmarks/results/methods.md. KD is CE + KD with
weights 1 and 1, so that SRKD differs from it in nothing but its own term; m-fitnet is SRKD without
any reset; srkd-flow lets gradients flow through the target. All: batch 128 (digits 64), Nesterov,
lr 0.1, weight decay 5e-4, one epoch of warm-up, cosine, crop (+ flip).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from kdtoolkit import distill
from kdtoolkit.models import load_model

METHODS: dict[str, dict[str, Any]] = {
    "alone": dict(method="none"),
    "kd": dict(method="kd", losses={"ce": 1.0, "kd": 1.0}),
    "srkd": dict(method="srkd", losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1}),
    "m-fitnet": dict(method="srkd", losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1}, reset=()),
    "srkd-flow": dict(method="srkd", losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1}, detach=False),
}


def run(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for name in args.methods:
            data = f"{args.data}_{args.rows}" if args.rows else args.data
            folder = Path(args.runs) / f"{data}-{args.student}-{name}-e{args.epochs}-s{seed}"
            if (folder / "report.md").exists():
                continue
            teacher = None if name == "alone" else args.teacher
            known = load_model(args.teacher, pretrained=False, role="teacher")
            shortcut = getattr(known, "kd_model_args", {}).get("shortcut", "B")
            distill(
                teacher,
                args.student,
                args.data,
                data_path=args.data_path,
                **METHODS[name],
                epochs=args.epochs,
                batch_size=64 if args.data == "digits" else 128,
                optimizer="nesterov",
                lr=0.1,
                weight_decay=5e-4,
                scheduler="cosine",
                warmup_epochs=1,
                validation="none",
                seed=seed,
                eval_every=3,
                mixed_precision=args.precision,
                train_limit=args.rows or None,
                output_dir=folder,
                resume="auto",
                student_args={"shortcut": shortcut},
                report_to="none",
                label=folder.name,
                progress="lines",
            )


def table(args: argparse.Namespace) -> None:
    groups: dict[tuple[str, str, int], dict[str, list[dict]]] = {}
    for folder in sorted(Path(args.runs).glob("*-s*")):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        final = next((r for r in rows if r["event"] == "final"), None)
        if final is None:
            continue
        data, rest = folder.name.split("-", 1)
        student, rest = rest.split("-", 1)
        name, epochs, _ = rest.rsplit("-", 2)
        final["images_per_s"] = statistics.median(
            r["images_per_s"] for r in rows if r["event"] == "train"
        )
        final["env"] = json.loads((folder / "env.json").read_text())
        final["config"] = yaml.safe_load((folder / "config.yaml").read_text())
        groups.setdefault((data, student, int(epochs[1:])), {}).setdefault(name, []).append(final)
    lines = ["# Student alone, KD, SRKD", "", (__doc__ or "").strip().split("\n\n", 1)[1], ""]
    for (data, student, epochs), methods in groups.items():
        teacher = next(
            (f["teacher_top1"] for fs in methods.values() for f in fs if "teacher_top1" in f), None
        )
        lines += [
            f"## {data}, {student}, {epochs} epochs, last epoch; teacher top-1 {teacher} %",
            "",
        ]
        lines += [_origin(next(iter(methods.values()))[0], data, student, epochs), ""]
        lines += [
            "| method | n | top-1 % | per seed | agreement % | images/s (median) |",
            "|---|---|---|---|---|---|",
        ]
        for name in [m for m in METHODS if m in methods]:
            tops = [f["top1"] for f in methods[name]]
            spread = f" ± {statistics.stdev(tops):.2f}" if len(tops) > 1 else ""
            agree = [f["agreement"] for f in methods[name] if "agreement" in f]
            agreement = f"{statistics.mean(agree):.2f}" if agree else ""
            speed = statistics.median(f["images_per_s"] for f in methods[name])
            each = ", ".join(f"{t:.2f}" for t in tops)
            lines.append(
                f"| {name} | {len(tops)} | {statistics.mean(tops):.2f}{spread} | {each} | "
                f"{agreement} | {speed:.0f} |"
            )
        lines.append("")
    Path(args.out).write_text("\n".join(lines))
    print("\n".join(lines))


def _origin(final: dict, data: str, student: str, epochs: int) -> str:
    """Command and machine of a group of runs."""
    env, config = final["env"], final["config"]
    data_config, precision = config["data"], config["loop"]["mixed_precision"]
    rows = f" --rows {data_config['train_limit']}" if data_config.get("train_limit") else ""
    packages = ", ".join(f"{p} {env['packages'][p]}" for p in ("torch", "timm"))
    return (
        f"`python benchmarks/methods.py run --data {data_config['train_data']} "
        f"--student {student} --epochs {epochs}{rows} --precision {precision} --teacher ... "
        f"--seeds ...`; {env['device']}, {packages}, {env['threads']} thread(s) a run; "
        "images/s depend on what else ran on the machine"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.set_defaults(do=run)
    runner.add_argument("--data", default="cifar10")
    runner.add_argument("--data-path", default=None, help="a local copy of the data")
    runner.add_argument("--teacher", required=True)
    runner.add_argument("--student", default="cifar_resnet20")
    runner.add_argument(
        "--methods", nargs="+", default=["alone", "kd", "srkd"], choices=list(METHODS)
    )
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runner.add_argument("--rows", type=int, default=0, help="training rows to use; 0 is all")
    runner.add_argument("--epochs", type=int, default=12)
    runner.add_argument("--precision", default="bf16")
    tabler = commands.add_parser("table")
    tabler.set_defaults(do=table)
    tabler.add_argument("--out", default="benchmarks/results/methods.md")
    for command in (runner, tabler):
        command.add_argument("--runs", default="runs/methods")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
