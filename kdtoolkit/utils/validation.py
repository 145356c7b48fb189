"""Checks of values that a user gives: each raises `ValueError` with what was given and allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Check that an option is one of those allowed.

    A value must have the type of a choice to be equal to it: 1 is not True.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        allowed: The values it may have.

    Raises:
        ValueError: If `value` is none of them.
    """
    known = list(allowed)
    if not any(_is_same(value, choice) for choice in known):
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, known))}")


def _is_same(value: object, choice: object) -> bool:
    return value is choice or (type(value) is type(choice) and value == choice)


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
        value: What was given; a bool, a string or a tensor is no number.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        above: The value must be larger than this.
        below: The value must be smaller than this.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and minimum <= number <= maximum and above < number < below:
        return
    bounds = (
        (f"from {minimum:g}", minimum),
        (f"above {above:g}", above),
        (f"up to {maximum:g}", maximum),
        (f"below {below:g}", below),
    )
    texts = [text for text, bound in bounds if math.isfinite(bound)]
    allowed = " ".join(["a finite number", *texts])
    raise ValueError(f"{name} is {value!r}; allowed: {allowed}{_note(meaning)}")


def _note(meaning: str) -> str:
    return f" ({meaning})" if meaning else ""


def check_positive(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a finite number above 0.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    check_number(name, value, above=0, meaning=meaning)


def check_non_negative(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a finite number from 0.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    check_number(name, value, minimum=0, meaning=meaning)


def check_fraction(name: str, value: object, meaning: str = "") -> None:
    """Check that a value is a number from 0 to 1, both included.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        meaning: What the number means, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    check_number(name, value, minimum=0, maximum=1, meaning=meaning)


def check_whole_number(name: str, value: object, *, minimum: int = 1, meaning: str = "") -> None:
    """Check that a value is a whole number; a float is none.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given; a bool is no number.
        minimum: Smallest allowed value.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum:
        return
    raise ValueError(f"{name} is {value!r}; allowed: a whole number from {minimum}{_note(meaning)}")


def check_temperature(temperature: object) -> None:
    """Check that a temperature (no unit) is a finite number above 0.

    Args:
        temperature: What was given.

    Raises:
        ValueError: If it is not such a number.
    """
    check_positive("temperature", temperature)
