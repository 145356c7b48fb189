"""K peers of one architecture on the same batch: one after another against all at once.

    OMP_NUM_THREADS=1 python benchmarks/batched_peers.py [--models cifar_resnet8] [--peers 2 3 6]
                                                         [--rounds 7] [--precisions no bf16]
                                                         [--device cuda] [--out FILE]

    loop       K forwards of K networks in channels_last, as `kdtoolkit.Peers` runs them
    vmap       torch.func: stacked parameters and buffers, one functional_call under vmap, x shared.
               On the CPU autocast does not reach conv2d under vmap, and BatchNorm there refuses
               bf16 beside float32 statistics, so with bf16 hooks cast for every convolution and
               back for every BatchNorm
    grouped    one network of convolutions with K groups and BatchNorm of K-fold channels, the stem
               dense because all see the same x, the head a batched product; channels_last

A step is forward, the sum of K cross-entropies, backward and SGD with momentum. All start from the
same weights; before anything is timed, three steps of each are compared with the loop's: losses,
and BatchNorm's running statistics. Times are processor time on the CPU, where other programs do not
count, and wall-clock time on CUDA; all variants take turns in one process; only ratios mean
anything.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import kdtoolkit
from kdtoolkit.utils.memory import keep_freed_memory

# x -> logits (K, B, C); what is trained; buffers of every network
Variant = tuple[
    Callable[[Tensor], Tensor], list[nn.Parameter], Callable[[], list[dict[str, Tensor]]]
]


class Heads(nn.Module):
    """K linear layers, each on its own share of the channels: (B, K * F) -> (K, B, C)."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        weights = torch.stack([m.weight.detach().t() for m in layers])
        biases = torch.stack([m.bias.detach() for m in layers])
        self.weight = nn.Parameter(weights)  # (K, F, C)
        self.bias = nn.Parameter(biases.unsqueeze(1))  # (K, 1, C)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (len(self.weight), -1)).transpose(0, 1) @ self.weight + self.bias


def merge_layers(layers: list[nn.Module]) -> nn.Module | None:
    """K layers side by side in one; None for a layer without weights of its own."""
    first, count = layers[0], len(layers)
    if isinstance(first, nn.Linear):
        return Heads(layers)  # type: ignore[arg-type]
    if isinstance(first, nn.BatchNorm2d):
        new: nn.Module = nn.BatchNorm2d(count * first.num_features, first.eps, first.momentum)
    elif isinstance(first, nn.Conv2d) and first.groups == 1 and first.bias is None:
        stem = first.in_channels == 3
        shape = (first.in_channels * (1 if stem else count), first.out_channels * count)
        options = dict(
            stride=first.stride, padding=first.padding, groups=1 if stem else count, bias=False
        )
        new = nn.Conv2d(*shape, first.kernel_size, **options)  # type: ignore[arg-type]
    elif first.state_dict() and not list(first.children()):
        raise ValueError(
            f"{type(first).__name__} has no grouped form here; allowed: Conv2d, BatchNorm2d, Linear"
        )
    else:
        return None
    states = [m.state_dict() for m in layers]
    new.load_state_dict(
        {k: torch.cat([s[k] for s in states]) if v.dim() else v for k, v in states[0].items()}
    )
    return new


def loop(nets: list[nn.Module]) -> Variant:
    nets = [copy.deepcopy(n).to(memory_format=torch.channels_last) for n in nets]  # type: ignore[call-overload]
    params = [p for n in nets for p in n.parameters()]
    return (
        lambda x: torch.stack([n(x) for n in nets]),
        params,
        lambda: [dict(n.named_buffers()) for n in nets],
    )


def batched(nets: list[nn.Module], cast: bool) -> Variant:
    params, buffers = stack_module_state([copy.deepcopy(n) for n in nets])  # type: ignore[arg-type]
    skeleton = copy.deepcopy(nets[0]).to("meta")
    for module in skeleton.modules() if cast else ():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args: args[0].float())

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        if cast:
            p = {n: w.bfloat16() if w.dim() == 4 else w for n, w in p.items()}
        return functional_call(skeleton, (p, b), (x,))

    trained = [p.detach().requires_grad_() for p in params.values()]
    params = dict(zip(params, trained, strict=True))
    run = vmap(one, in_dims=(0, 0, None))

    def all_buffers() -> list[dict[str, Tensor]]:
        return [{n: b[k] for n, b in buffers.items()} for k in range(len(nets))]

    return lambda x: run(params, buffers, x), trained, all_buffers


def grouped(nets: list[nn.Module]) -> Variant:
    one = copy.deepcopy(nets[0])
    for name, _ in list(one.named_modules()):
        if name and (new := merge_layers([n.get_submodule(name) for n in nets])):
            parent, _, child = name.rpartition(".")
            setattr(one.get_submodule(parent), child, new)
    one.to(nets[0].fc.weight.device, memory_format=torch.channels_last)  # type: ignore[call-overload, union-attr]
    count = len(nets)

    def buffers_of(k: int) -> dict[str, Tensor]:
        return {n: b.chunk(count)[k] if b.dim() else b for n, b in one.named_buffers()}

    return one, list(one.parameters()), lambda: [buffers_of(k) for k in range(count)]


def statistics_of(buffers: list[dict[str, Tensor]]) -> Tensor:
    """Running means, variances and counts of all networks in one vector."""
    return torch.cat([b[n].detach().flatten().float() for b in buffers for n in sorted(b)]).clone()


def make_step(variant: Variant, x: Tensor, y: Tensor, half: bool) -> Callable[[], Tensor]:
    forward, params, _ = variant
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def step() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = forward(x)
        targets = y.repeat(len(logits))
        each = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        losses = each.view(len(logits), -1).mean(1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    return step


def seconds(step: Callable[[], Tensor], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def row(model: str, peers: int, precision: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    nets = [timm.create_model(model, num_classes=100).to(args.device).train() for _ in range(peers)]
    x = torch.rand(args.batch, 3, 32, 32, device=args.device).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 100, (args.batch,), device=args.device)
    half = precision == "bf16"
    variants = {
        "loop": loop(nets),
        "vmap": batched(nets, half and not args.autocast_alone),
        "grouped": grouped(nets),
    }
    steps = {name: make_step(variant, x, y, half) for name, variant in variants.items()}
    losses = {name: torch.stack([step() for _ in range(3)]) for name, step in steps.items()}
    others = [name for name in variants if name != "loop"]
    loss_errors = [(losses[n] - losses["loop"]).abs().max().item() for n in others]
    running = {name: statistics_of(variant[2]()) for name, variant in variants.items()}
    expected = running["loop"]
    relative = [(running[n] - expected).abs() / expected.abs().clamp(min=1) for n in others]
    statistics_errors = [errors.max().item() for errors in relative]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            times[name].append(seconds(steps[name], args.device))
    cells = [f"{statistics.median(times['loop']) * 1e3:.0f}"]
    for name in others:
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(times[name], times["loop"], strict=True)], n=4
        )
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    cells += [f"{max(loss_errors):.1e}", f"{max(statistics_errors):.1e}"]
    return f"| {model} | {precision} | {peers} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["cifar_resnet8", "cifar_resnet20"])
    parser.add_argument("--peers", nargs="+", type=int, default=[2, 3, 6], help="how many networks")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--batch", type=int, default=128, help="images, 32 x 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--autocast-alone", action="store_true", help="no casts by hooks under vmap"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="", help="file to append the table to")
    args = parser.parse_args()
    # as_strided_ of the pooling layer under vmap
    warnings.filterwarnings("ignore", message="There is a performance drop")
    if args.device == "cpu":
        keep_freed_memory()  # as every run of distill() does
    lines = [
        f"{args.device} ({platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads), torch {torch.__version__}, "
        f"kdtoolkit {kdtoolkit.__version__}, batch {args.batch}, {args.rounds} rounds in turns",
        "",
        "| network | precision | K | loop, ms | vmap / loop | grouped / loop | losses apart | "
        "statistics apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for model in args.models:
        for precision in args.precisions:
            for peers in args.peers:
                lines.append(row(model, peers, precision, args))
                print(lines[-1], flush=True)
    if args.out:
        with Path(args.out).open("a") as file:
            file.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main()
