"""How the stages of two networks pair."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdtoolkit.features.stage_boundary import StageBoundary


def pair_stages(
    student: Sequence[StageBoundary], teacher: Sequence[StageBoundary]
) -> list[tuple[int, int]]:
    """Pair the stages of two networks.

    Pairs are in order, the last stage goes with the last, and there are as many as the shorter
    network has stages. Dynamic programming over the sum of |log2 of the ratio of strides| +
    |difference of relative depths|.

    Args:
        student: Ends of one network's stages, shallow to deep.
        teacher: Ends of the other's.

    Returns:
        Pairs (student stage, teacher stage), counted from 1; empty where one network has no stages.
    """
    num_s, num_t = len(student), len(teacher)
    count = min(num_s, num_t)
    if not count:
        return []

    def cost(s: int, t: int) -> float:
        strides = abs(math.log2(student[s].stride / teacher[t].stride))
        return strides + abs((s + 1) / num_s - (t + 1) / num_t)

    # (pairs before it, s, t) -> cost of the best pairs that end with (s, t), and the pair before it
    best: dict[tuple[int, int, int], tuple[float, tuple[int, int] | None]] = {}
    for k in range(count):
        for s in range(k, num_s):
            for t in range(k, num_t):
                if k == 0:
                    best[k, s, t] = (cost(s, t), None)
                    continue
                earlier = [(i, j) for i in range(k - 1, s) for j in range(k - 1, t)]
                total, previous = min((best[k - 1, i, j][0], (i, j)) for i, j in earlier)
                best[k, s, t] = (total + cost(s, t), previous)

    pairs = []
    pair: tuple[int, int] | None = (num_s - 1, num_t - 1)
    for k in reversed(range(count)):
        assert pair is not None
        s, t = pair
        pairs.append((s + 1, t + 1))
        pair = best[k, s, t][1]
    return pairs[::-1]
