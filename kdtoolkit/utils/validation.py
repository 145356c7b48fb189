"""Checks of values that a user gives: each raises ValueError that says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(what: str, given: object, allowed: Iterable[object]) -> None:
    """ValueError unless the option `what` is one of those allowed."""
    known = list(allowed)
    if given not in known:
        raise ValueError(f"{what} is {given!r}; allowed: {', '.join(map(repr, known))}")


def check_temperature(temperature: float) -> None:
    """ValueError unless a temperature (no unit) is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
