"""How well the ratio of two latencies repeats beside busy processes.

    python benchmarks/latency.py

Measures three pairs of networks five times each, alone and beside processes that keep cores busy
with a loop, with memory or with matrix products, and prints the ratios and the largest distance
from their median. Results: benchmarks/results/latency.md.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import timm

import kdtoolkit.models  # noqa: F401 - registers its networks with timm
from kdtoolkit.metrics import measure_costs

BUSY = {
    "loop": "while True: pass",
    "memory": "import numpy\na = numpy.ones(20_000_000)\nwhile True: a *= 1.0000001",
    "products": "import torch\na = torch.rand(1500, 1500)\nwhile True: a @ a",
}
LOADS = ((), ("loop",), ("memory",), ("products",), ("products", "memory"), ())
PAIRS = {  # teacher, student, pixels of a side
    "cifar_resnet20 / cifar_resnet8 at 32": ("cifar_resnet20", "cifar_resnet8", 32),
    "resnet34 / resnet18 at 64": ("resnet34", "resnet18", 64),
    "resnet50 / resnet18 at 128": ("resnet50", "resnet18", 128),
}
REPEATS = 5


@contextlib.contextmanager
def busy_processes(kinds: Sequence[str]) -> Iterator[None]:
    """Keep processors busy inside a block."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY[kind]]) for kind in kinds]
    try:
        time.sleep(3 if kinds else 0)  # seconds to start
        yield
    finally:
        for process in started:
            process.kill()


def measure_ratios(teacher: str, student: str, side: int) -> list[float]:
    """The ratio of the latencies, measured several times."""
    networks = {name: timm.create_model(name, num_classes=10) for name in (teacher, student)}
    ratios = []
    for _ in range(REPEATS):
        costs = measure_costs(networks, (3, side, side))
        ratios.append(costs[teacher].latency_ms / costs[student].latency_ms)
    return ratios


def main() -> None:
    """Measure every pair under every load."""
    found: dict[str, list[float]] = {name: [] for name in PAIRS}
    for load in LOADS:
        with busy_processes(load):
            for name, pair in PAIRS.items():
                ratios = measure_ratios(*pair)
                found[name] += ratios
                print(" + ".join(load) or "alone", name, *(f"{r:.3f}" for r in ratios), flush=True)
    for name, ratios in found.items():
        median = statistics.median(ratios)
        farthest = max(abs(ratio / median - 1) for ratio in ratios)
        print(f"{name}: median {median:.3f}, largest distance {100 * farthest:.1f} %")


if __name__ == "__main__":
    main()
