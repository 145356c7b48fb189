"""Networks that teach each other, compared with the same network trained alone.

    python benchmarks/strategies.py run --data cifar10 --data-path PATH --teacher PATH --rows 20000
    python benchmarks/strategies.py cost --teacher PATH
    python benchmarks/strategies.py table

Seeds are equal, and so is the budget of every network. `run` writes one folder per (arm, seed)
under --runs, skips what is finished and resumes what is not. `cost` measures one training step of
every arm against one of the network alone, in turns, in processor time. `table` reads the folders
and prints a Markdown table (--out also writes it to a file). All arms: batch 128, Nesterov, lr 0.1,
weight decay 5e-4, one epoch of warm-up, cosine, crop and flip, no validation split: last epoch,
test set, and the first network is exported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from kdtoolkit import Callback, distill
from kdtoolkit.callbacks.dcl import DCLMerger
from kdtoolkit.callbacks.mutual import MutualKL


def merge_at_the_end() -> list[Callback]:
    """Networks that were merged in the first tenth of the run are merged in the last tenth too."""
    late = DCLMerger(10, rule="mean", beta=0.5, start=0.9, statistics="recalibrated")
    late.name = "dcl-late"
    return [late]


PEERS: dict[str, dict[str, Any]] = {
    "independent": dict(method="dml", losses={"ce": 1.0}),
    "dml": dict(method="dml"),
    "dcl-paper": dict(method="dcl"),
    "dcl-eps-free": dict(method="dcl", rule="eps-free"),
    "dcl-mean": dict(method="dcl", rule="mean"),
    "dcl-early": dict(method="dcl", until=0.5),
    "dcl-early-25": dict(method="dcl", until=0.25),
    "dcl-early-75": dict(method="dcl", until=0.75),
    "dcl-early-mean": dict(method="dcl", rule="mean", until=0.5),
    "dcl-mutual": dict(method="dcl", callbacks=lambda: [MutualKL()]),
    "dcl-soup": dict(
        method="dcl", rule="mean", beta=0.5, until=0.1, views=True, callbacks=merge_at_the_end
    ),
    "dcl-views": dict(method="dcl", rule="mean", views=True),
    "dcl-views-100": dict(method="dcl", rule="mean", views=True, every=100, beta=0.5),
    "dcl-views-epoch": dict(
        method="dcl", rule="mean", views=True, every=1, unit="epochs", beta=0.5
    ),
    "kdcl": dict(method="kdcl"),
}
ARMS: dict[str, dict[str, Any]] = {
    "alone": dict(method="none"),
    **PEERS,
    "one": dict(method="one"),
    "okddip": dict(method="okddip"),
    "cl": dict(method="cl", branches=3),
    "pcl": dict(method="pcl"),
    "dkel": dict(method="dkel"),
    "byot": dict(method="byot"),
    "bake": dict(method="bake"),
    "mean_teacher": dict(method="mean_teacher"),
    "kd": dict(method="kd", losses={"ce": 1.0, "kd": 1.0}),
    "sokd": dict(method="sokd"),
}
WITH_TEACHER = ("kd", "sokd")


def train(args: argparse.Namespace, arm: str, seed: int, **more: Any) -> Any:
    given = {**ARMS[arm], **({"peers": args.networks} if arm in PEERS else {})}
    shared = dict(
        data_path=args.data_path,
        batch_size=128,
        optimizer="nesterov",
        lr=0.1,
        weight_decay=5e-4,
        scheduler="cosine",
        warmup_epochs=1,
        validation="none",
        seed=seed,
        mixed_precision=args.precision,
        report_to="none",
        train_limit=args.rows or None,
    )
    extra = given.pop("callbacks", list)()
    given["callbacks"] = [*extra, *more.pop("callbacks", [])]
    return distill(
        args.teacher if arm in WITH_TEACHER else None,
        args.student,
        args.data,
        **{**shared, **given, **more},
    )


def run(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for arm in args.arms:
            folder = Path(args.runs) / f"{arm}-k{args.networks}-s{seed}"
            if not (folder / "report.md").exists():
                train(
                    args,
                    arm,
                    seed,
                    epochs=args.epochs,
                    eval_every=args.epochs,
                    output_dir=folder,
                    resume="auto",
                    label=folder.name,
                    progress="lines",
                )


class StepTimer(Callback):
    """Processor time of every step, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_epoch_start(self, run: Any) -> None:
        self.last = time.process_time()

    def on_step_end(self, run: Any, step: Any) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now


def cost(args: argparse.Namespace) -> None:
    """Median step of each arm over that of the network alone, in runs that take turns."""
    seconds: dict[str, list[float]] = {arm: [] for arm in args.arms}
    for turn in range(args.turns):
        for arm in args.arms:
            timer = StepTimer()
            train(
                args,
                arm,
                turn,
                callbacks=[timer],
                eval_every=10**6,
                eval_test="end",
                progress="off",
                max_steps=args.steps,
                train_limit=128 * (args.steps + 1),
                warmup_epochs=0,
            )
            seconds[arm].append(statistics.median(timer.seconds[2:]))
    alone = seconds["alone"]
    ratios = {
        arm: statistics.median(s / a for s, a in zip(each, alone, strict=True))
        for arm, each in seconds.items()
    }
    Path(args.costs).parent.mkdir(parents=True, exist_ok=True)
    Path(args.costs).write_text(
        json.dumps({"turns": args.turns, "steps": args.steps, "ratios": ratios}, indent=1)
    )
    print(ratios)


def table(args: argparse.Namespace) -> None:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for folder in sorted(f for f in Path(args.runs).glob("*-k*-s*") if (f / "report.md").exists()):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        final = next((r for r in rows if r["event"] == "final"), None)
        if final is not None:
            arm, networks, _ = folder.name.rsplit("-", 2)
            final["diversity"] = [r for r in rows if r["event"] == "diversity"][-1:]
            groups.setdefault((arm, networks), []).append(final)
    costs = json.loads(Path(args.costs).read_text())["ratios"] if Path(args.costs).exists() else {}
    lines = [
        "| arm | n | exported | top-1 % | mean of trained networks % | ensemble % "
        "| disagreement % | step / alone |",
        "|" + "---|" * 8,
    ]
    for arm, networks in sorted(groups, key=lambda g: (list(ARMS).index(g[0]), g[1])):
        finals = groups[arm, networks]
        # SOKD's branch is a teacher and is not counted among the trained networks
        measured = [{} if arm in WITH_TEACHER else f.get("networks", {}) for f in finals]
        trained = [
            [v for k, v in nets.items() if k != "ensemble" and not k.startswith("ema")]
            for nets in measured
        ]
        ensembles = [nets["ensemble"] for nets in measured if nets.get("ensemble") is not None]
        disagreement = [
            row["disagreement"] for f in finals for row in f["diversity"] if "disagreement" in row
        ]
        cells = [
            f"{arm} ({networks})" if arm in PEERS else arm,
            str(len(finals)),
            finals[0]["exported"],
            spread([f["top1"] for f in finals]),
            spread([statistics.mean(values) for values in trained if values]),
            spread(ensembles),
            spread(disagreement),
            f"{costs[arm]:.2f}" if arm in costs else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, do in (("run", run), ("cost", cost), ("table", table)):
        command = commands.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("--runs", default="runs/strategies")
        command.add_argument("--costs", default="runs/strategies/costs.json")
        command.add_argument("--out", default="")
        command.add_argument("--data", default="cifar10")
        command.add_argument("--data-path", default=None, help="a local copy of the data")
        command.add_argument("--teacher", default=None, help=f"for {', '.join(WITH_TEACHER)}")
        command.add_argument("--student", default="cifar_resnet8")
        command.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
        command.add_argument("--networks", type=int, default=2, help="peers, K")
        command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        command.add_argument("--rows", type=int, default=0, help="training rows to use; 0 is all")
        command.add_argument("--epochs", type=int, default=10)
        command.add_argument("--precision", default="bf16")
        command.add_argument("--turns", type=int, default=5)
        command.add_argument(
            "--steps", type=int, default=12, help="measured in each turn, the first two left out"
        )
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
