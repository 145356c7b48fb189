"""What a distillation step costs, in time and peak memory.

    python benchmarks/step_cost.py [--precision bf16] [--rounds 9] [--device cuda]
    python benchmarks/step_cost.py taps [--precision bf16] [--rounds 15] [--device cuda]

The first compares a KD and an SRKD step with the student's step plus the teacher's forward; with
`taps`, a training step with every stage tapped is compared with the same step without taps.

All variants take turns in one process; times are medians over the rounds, and only ratios mean
anything. Peak memory is what a step allocates at its highest point: on the CPU from the profiler's
record of every allocation, on CUDA from the allocator's counter. `teacher` is the plain forward
that anyone would write: model.eval() under no_grad and autocast, nothing folded; `teacher, ours` is
the Frozen teacher of a KD step. With `taps` the features are kept to the end of the step and
nothing is computed from them; `calls` is how many modules were called with and without taps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import kdtoolkit
from kdtoolkit import Frozen, Taps, create_method
from kdtoolkit.types import Batch, Clock
from kdtoolkit.utils.memory import keep_freed_memory

Step = Callable[[], None]
NETWORKS = {  # name -> (constructor arguments, pixels, batch)
    "cifar_resnet20": ({}, 32, 128),
    "resnet18": ({}, 64, 32),
    "vit_tiny_patch16_224": ({"img_size": 64, "patch_size": 8}, 64, 32),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)},
        64,
        32,
    ),
    "hrnet_w18_small": ({}, 64, 16),
}


def build(args: argparse.Namespace) -> dict[str, Step]:
    torch.manual_seed(0)
    device, half = torch.device(args.device), {"bf16": torch.bfloat16, "no": None}[args.precision]
    batch = Batch(
        x=torch.rand(args.batch, 3, args.size, args.size, device=device).contiguous(
            memory_format=torch.channels_last
        ),
        y=torch.randint(0, 100, (args.batch,), device=device),
        index=torch.arange(args.batch, device=device),
    )

    def net(name: str) -> torch.nn.Module:
        made = timm.create_model(name, num_classes=100)
        return made.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, half) if half else contextlib.nullcontext()

    teacher = net(args.teacher)

    def train(name: str) -> Step:
        frozen = [] if name == "none" else [Frozen(copy.deepcopy(teacher), None, args.size)]
        method = create_method(name, Taps(net(args.student), None, args.size), frozen).to(device)
        method.place_teachers(device, torch.channels_last, half)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            with autocast():
                losses = method(batch, Clock(step=1, total_steps=10)).losses
            sum(losses.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

        return step

    plain = copy.deepcopy(teacher).eval()
    own = Frozen(copy.deepcopy(teacher), None, args.size)
    if half:
        own.fold_batch_norms(half)

    def forward(model: Callable) -> Step:
        def step() -> None:
            with torch.no_grad(), autocast():
                model(batch["x"])

        return step

    steps = {"student": train("none"), "teacher": forward(plain), "teacher, ours": forward(own)}
    return steps | {"kd": train("kd"), "srkd": train("srkd")}


def seconds(step: Step, device: str) -> float:
    """Processor time on the CPU, where other programs do not count; wall-clock time on CUDA."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def peak(step: Step, device: str) -> float:
    """MiB allocated at the highest point of one step, above what was there before."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    level = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest / 2**20


def tapped(
    name: str, args: argparse.Namespace
) -> tuple[Step, Callable[[bool], Taps], Callable[[], int]]:
    options, size, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100, **options).to(
        args.device, memory_format=torch.channels_last
    )
    taps = Taps(model, None, size)
    everything = list(range(1, len(taps.stages) + 1))
    x = torch.rand(batch, 3, size, size, device=args.device).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 100, (batch,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    device, half = torch.device(args.device).type, args.precision == "bf16"

    def tap(every: bool) -> Taps:
        return taps.select(everything if every else [])

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = taps(x)
        torch.nn.functional.cross_entropy(out.logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def calls() -> int:
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        handles = [m.register_forward_pre_hook(counted) for m in model.modules()]
        taps(x)
        for handle in handles:
            handle.remove()
        return count

    return step, tap, calls


def tap_row(name: str, args: argparse.Namespace) -> str:
    step, tap, calls = tapped(name, args)
    counts, memory = {}, {}
    for every in (True, False):
        tap(every)
        step()
        step()
        counts[every], memory[every] = calls(), peak(step, args.device)
    ratios, plain = [], []
    for number in range(args.rounds):
        times = {}
        for every in (False, True) if number % 2 else (True, False):
            tap(every)
            times[every] = seconds(step, args.device)
        ratios.append(times[True] / times[False])
        plain.append(times[False])
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"| {name} | {len(tap(True).keys)} | {statistics.median(plain) * 1e3:.1f} | "
        f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) | "
        f"{memory[True] / memory[False]:.3f} | {counts[True]} / {counts[False]} |"
    )


def machine(args: argparse.Namespace) -> str:
    return (
        f"{args.precision}, {args.device} ({platform.machine()}, {torch.get_num_threads()} "
        f"threads), torch {torch.__version__}, kdtoolkit {kdtoolkit.__version__}"
    )


def method_lines(args: argparse.Namespace) -> list[str]:
    steps = build(args)
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, args.device))
    memory = {name: peak(step, args.device) for name, step in steps.items()}
    middle = {name: statistics.median(t) for name, t in times.items()}
    both_t, both_m = middle["student"] + middle["teacher"], memory["student"] + memory["teacher"]
    both = [s + t for s, t in zip(times["student"], times["teacher"], strict=True)]
    ratios = {
        n: statistics.median(k / b for k, b in zip(times[n], both, strict=True))
        for n in ("kd", "srkd")
    }
    lines = [
        f"{args.teacher} -> {args.student}, batch {args.batch}, {args.size} px, {machine(args)}, "
        f"medians of {args.rounds} interleaved rounds",
        "",
        "| step | ms | of student + teacher | peak MiB | of student + teacher |",
        "|---|---|---|---|---|",
    ]
    for name in steps:
        share = ratios.get(name, middle[name] / both_t)
        lines.append(
            f"| {name} | {middle[name] * 1e3:.1f} | {share:.3f} | {memory[name]:.1f} | "
            f"{memory[name] / both_m:.3f} |"
        )
    return lines


def tap_lines(args: argparse.Namespace) -> list[str]:
    return [
        f"{machine(args)}, {args.rounds} rounds in turns",
        "",
        "| network | taps | step without, ms | ratio, median (quartiles) | memory | calls with / "
        "without |",
        "|---|---|---|---|---|---|",
        *(tap_row(name, args) for name in NETWORKS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="methods", choices=["methods", "taps"])
    parser.add_argument("--teacher", default="cifar_resnet56")
    parser.add_argument("--student", default="cifar_resnet20")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()  # as every run of distill() does
    lines = {"methods": method_lines, "taps": tap_lines}[args.what](args)
    print("\n".join(lines))
    if args.out:
        with Path(args.out).open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
