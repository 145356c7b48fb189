"""The processors that this process may use."""

from __future__ import annotations

import os


def usable_processors() -> int:
    """Return how many processors this process may use, at least 1.

    They are those of its affinity (taskset, batch schedulers) and of its control group's quota
    (containers), divided by the ranks of torchrun on this machine.
    """
    import joblib

    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return max(int(joblib.cpu_count()) // ranks, 1)
