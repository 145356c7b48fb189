"""The processors that a process may use: affinity, quotas of containers, ranks."""

import os
import subprocess
import sys

import pytest

from kdtoolkit import data as kd
from kdtoolkit.utils import processors

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes"
)
CODE = "from kdtoolkit.utils.processors import usable_processors; print(usable_processors())"


@needs_affinity
def test_a_process_of_one_processor_counts_one():
    first = min(os.sched_getaffinity(0))
    found = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{first}]); {CODE}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("count", "ranks", "workers"), [(1, 1, 1), (6, 2, 3), (2, 4, 1), (64, 1, 8)]
)
def test_workers_of_auto(count, ranks, workers, monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert processors.usable_processors() == max(count // ranks, 1)
    monkeypatch.setattr("kdtoolkit.data.cache.MAX_CACHE_BYTES", 1000)
    assert kd.load("digits").train.num_workers == workers
    assert kd.load("digits", num_workers=5).train.num_workers == 5
