"""Which stages of a network can be run alone, and how the stages of two networks pair."""

from __future__ import annotations

import math
from collections import defaultdict

from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.features.tracing import Call, Trace, Value


def module_chain(tr: Trace, start: StageBoundary, end: StageBoundary) -> list[str] | None:
    """Names of called modules that lead from the output of `start` to the output of `end`, each fed with nothing but
    what the one before returned; None when anything else happens in between. Such a stage can be run alone."""
    if len(start.parts) > 1 or len(end.parts) > 1 or start.parts[0].path or end.parts[0].path:
        return None
    goal = end.parts[0].value
    takers: dict[Value, list[Call]] = defaultdict(list)
    for calls in tr.calls.values():
        call = calls[0]
        if (
            len(calls) == 1
            and call.plain
            and call.bare
            and len(call.inputs) == 1
            and len(call.values) == 1
        ):
            if call.name and call.left <= end.left and call.values[0] != call.inputs[0]:
                takers[call.inputs[0]].append(call)

    dead: set[Value] = set()  # values from which no chain leads to the goal

    def search(value: Value, depth: int) -> list[str] | None:
        if value == goal:
            return []
        if depth > 500 or value in dead:
            return None
        dead.add(value)
        for call in sorted(
            takers[value], key=lambda c: c.entered - c.left
        ):  # the outermost module first
            rest = search(call.values[0], depth + 1)
            if rest is not None:
                return [call.name, *rest]
        return None

    return search(start.parts[0].value, 0)


def pair_stages(
    student: list[StageBoundary], teacher: list[StageBoundary]
) -> list[tuple[int, int]]:
    """Pairs (student stage, teacher stage), 1-based, monotone, last with last, as many as the shorter network has.

    Dynamic programming on |log2 of the stride ratio| + |difference of relative depth|.
    """
    many_s, many_t = len(student), len(teacher)
    count = min(many_s, many_t)
    if not count:
        return []

    def cost(i: int, j: int) -> float:
        strides = abs(math.log2(student[i].stride / teacher[j].stride))
        return strides + abs((i + 1) / many_s - (j + 1) / many_t)

    best: dict[tuple[int, int, int], tuple[float, tuple[int, int] | None]] = {}
    for k in range(count):
        for i in range(k, many_s):
            for j in range(k, many_t):
                if k == 0:
                    best[k, i, j] = (cost(i, j), None)
                    continue
                options = [
                    (best[k - 1, a, b][0], (a, b)) for a in range(k - 1, i) for b in range(k - 1, j)
                ]
                before, where = min(options)
                best[k, i, j] = (before + cost(i, j), where)
    place: tuple[int, int] | None = (many_s - 1, many_t - 1)
    pairs = []
    for k in reversed(range(count)):
        assert place is not None
        pairs.append((place[0] + 1, place[1] + 1))
        place = best[k, place[0], place[1]][1]
    return pairs[::-1]
