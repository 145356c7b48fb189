"""Memory of the C library on the CPU: keep what one step frees for the next one.

glibc returns the top of the heap to the system whenever enough of it is free. A teacher's forward
pass between a student's forward and backward pass makes that happen in every step: 40,000 page
faults and 10 to 15 % of the time of a KD step of ResNet-56 to ResNet-20 (benchmarks/step_cost.py).
Keeping the memory costs nothing that the step did not need anyway.
"""

from __future__ import annotations

import ctypes
import functools
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # options of mallopt(3)
TRIM_BYTES, MMAP_BYTES = 2**31 - 1, 32 * 2**20


@functools.cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for trimming and mmap, once per process.

    They stay as they are where the user has set them (the environment variable
    MALLOC_TRIM_THRESHOLD_), or where the C library is another one.

    Returns:
        Whether they were raised.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(TRIM_THRESHOLD, TRIM_BYTES) and mallopt(MMAP_THRESHOLD, MMAP_BYTES))
