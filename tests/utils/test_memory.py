"""Freed memory stays with the process: the second of two equal steps finds its pages."""

import os
import platform
import subprocess
import sys

import pytest

STEP = """
import resource, sys, torch
from kdtoolkit.utils.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    before, kept = faults(), []
    for _ in range(64):
        kept.append(torch.ones(1 << 19))  # 2 MiB
        torch.ones(1 << 20).add_(1)
    return faults() - before
[step() for _ in range(3)]
print(step())
"""


def faults_of_a_step(mode):
    # glibc moves its thresholds while a process runs; one that is given stays, so that the memory
    # of every tensor goes back to the system unless `keep_freed_memory` says otherwise
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    env["MALLOC_MMAP_THRESHOLD_"] = "131072"
    done = subprocess.run(
        [sys.executable, "-c", STEP, mode], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_reuses_the_memory_of_the_one_before():
    assert 5 * faults_of_a_step("keep") < faults_of_a_step("leave")
