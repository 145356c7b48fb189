"""Latency: in turns, of one thread, and the same ratio beside a busy process."""

import statistics
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import kdtoolkit.models  # noqa: F401
from kdtoolkit.metrics import measure_costs, model_cost

BUSY = (
    "import numpy as np\na = np.ones(20_000_000)\nprint(1, flush=True)\nwhile True: a *= 1.0000001"
)


class Recorder(nn.Module):
    """Its copies write into the same list."""

    calls: list = []  # noqa: RUF012

    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(4, 2), name

    def forward(self, x):
        self.calls.append((self.name, torch.get_num_threads()))
        return self.layer(x.mean(1)[:, 0])


@pytest.mark.parametrize(
    ("seconds", "passes"), [(model_cost.MAX_SECONDS, model_cost.MAX_PASSES), (0.0, 1)]
)
def test_networks_take_turns_on_one_thread(seconds, passes, monkeypatch):
    monkeypatch.setattr(model_cost, "MAX_SECONDS", seconds)
    monkeypatch.setattr(Recorder, "calls", [])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        nets = {name: Recorder(name) for name in ("a", "b")}
        found = model_cost._measure_latencies(
            nets, dict.fromkeys(nets, (3, 4, 4)), torch.device("cpu"), 1
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    turns = model_cost.WARMUP_PASSES + model_cost.ROUNDS * passes
    assert Recorder.calls == [("a", 1), ("b", 1)] * turns and model_cost.ROUNDS >= 5
    assert all(value > 0 for value in found.values())


def test_the_median_of_rounds_counts(monkeypatch):
    times = iter([9.0] * 2 * model_cost.WARMUP_PASSES + [3, 1, 1, 1, 2, 1, 9, 1, 5, 1, 4, 1, 6, 1])
    monkeypatch.setattr(model_cost, "MAX_PASSES", 1)
    monkeypatch.setattr(model_cost, "_time_forward", lambda *_: next(times))
    nets = {"teacher": nn.Linear(4, 2), "student": nn.Linear(4, 2)}
    found = model_cost._time_in_turns(nets, dict.fromkeys(nets, (4,)), torch.device("cpu"), 1)
    assert found == {"teacher": 4000.0, "student": 1000.0}


def ratio(nets):
    found = [measure_costs(nets, (3, 32, 32)) for _ in range(3)]
    return statistics.median(cost["t"].latency_ms / cost["s"].latency_ms for cost in found)


def test_the_ratio_is_the_same_beside_a_busy_process():
    nets = {"t": timm.create_model("cifar_resnet20"), "s": timm.create_model("cifar_resnet8")}
    alone = ratio(nets)
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        try:
            busy.stdout.readline()
            beside = ratio(nets)
        finally:
            busy.kill()
    assert beside == pytest.approx(alone, rel=0.1) and 1.5 < alone < 4
