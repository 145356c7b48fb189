"""The C library's memory on the CPU: keep what a step frees for the next one.

glibc gives the top of the heap back to the system whenever enough of it is free, which a teacher's forward between a
student's forward and backward makes happen in every step: 40,000 page faults and 10 to 15 % of the time of a KD step of
ResNet-56 -> ResNet-20 (benchmarks/step_cost.py). Keeping it costs nothing that the step did not need anyway.
"""

from __future__ import annotations

import ctypes
import functools
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt(3)


@functools.cache
def keep_freed_memory() -> bool:
    """Raise glibc's trim and mmap thresholds, once per process; whether it was done.

    Left alone where the user has set them (MALLOC_TRIM_THRESHOLD_) and where the C library is another one.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(MMAP_THRESHOLD, 32 * 2**20))
