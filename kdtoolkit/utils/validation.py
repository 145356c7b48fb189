"""Checks of values that a user gives. Each raises `ValueError` with what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Check that an option is one of those allowed.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        allowed: The values it may have.

    Raises:
        ValueError: If `value` is none of them.
    """
    known = list(allowed)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in known):
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, known))}")


def check_number(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    meaning: str = "",
) -> None:
    """Check that a value is a finite number within bounds.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given; a bool or a string is no number.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        above: The value must be larger than this.
        below: The value must be smaller than this.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    if math.isfinite(number) and minimum <= number <= maximum and above < number < below:
        return
    bounds = [
        text
        for text, bound in (
            (f"from {minimum:g}", minimum),
            (f"above {above:g}", above),
            (f"up to {maximum:g}", maximum),
            (f"below {below:g}", below),
        )
        if math.isfinite(bound)
    ]
    allowed = " ".join(["a finite number", *bounds])
    raise ValueError(f"{name} is {value!r}; allowed: {allowed}{f' ({meaning})' if meaning else ''}")


def check_positive(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a finite number above 0; see `check_number`."""
    check_number(name, value, above=0, meaning=meaning)


def check_non_negative(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a finite number from 0; see `check_number`."""
    check_number(name, value, minimum=0, meaning=meaning)


def check_fraction(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a number from 0 to 1; see `check_number`."""
    check_number(name, value, minimum=0, maximum=1, meaning=meaning)


def check_whole_number(name: str, value: object, *, minimum: int = 1, meaning: str = "") -> None:
    """Check that a value is a whole number (an `int`) from `minimum`.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given; a bool is no number.
        minimum: Smallest allowed value.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        note = f" ({meaning})" if meaning else ""
        raise ValueError(f"{name} is {value!r}; allowed: a whole number from {minimum}{note}")


def check_temperature(temperature: object) -> None:
    """Check that a temperature (no unit) is a finite number above 0."""
    check_positive("temperature", temperature)
