"""Checks of values that a user gives: each raises `ValueError` with what was given and allowed.

A number may be a scalar of NumPy. A tensor is none: `distill()` turns scalar tensors into numbers
with `plain_scalar` before they are checked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from numbers import Integral, Real

MAX_WHOLE_NUMBER = 2**63 - 1  # what int64 holds
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e4  # beyond, T^2 KL has no correct digit in float32
MAX_SHOWN = 200  # characters of a value in a message


def plain_scalar(value: object) -> object:
    """A scalar of NumPy or torch as a plain Python value; anything else as it is.

    Args:
        value: Any value.

    Returns:
        An int, float or bool for a NumPy scalar, or a 0-dimensional array or tensor that needs no
        gradient; else `value` itself.
    """
    if type(value) in (bool, int, float, str):
        return value
    item, shape = getattr(value, "item", None), getattr(value, "shape", None)
    is_scalar = callable(item) and isinstance(shape, tuple) and not shape
    if not is_scalar or getattr(value, "requires_grad", False):
        return value
    with contextlib.suppress(Exception):  # a tensor on the meta device has no value
        return item()  # type: ignore[misc]
    return value


def describe_value(value: object) -> str:
    """A value as a message shows it: on one line, and not longer than can be read.

    Args:
        value: Any value.

    Returns:
        Its `repr`, cut in the middle where it is long; of a network or a large tensor its type.
    """
    try:
        text = repr(value)
    except Exception:  # an object whose repr fails is still to be named
        return f"an object of {type(value).__name__}"
    if "\n" in text and type(value).__module__ != "builtins" and len(text) > MAX_SHOWN:
        return f"an object of {type(value).__name__}"  # a network, a large tensor
    text = " ".join(text.split())
    if len(text) <= MAX_SHOWN:
        return text
    half = MAX_SHOWN // 2
    return f"{text[:half]} ... {text[-half:]}"


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
        choices = ", ".join(map(repr, known))
        raise ValueError(f"{name} is {describe_value(value)}; allowed: {choices}")


def _is_same(value: object, choice: object) -> bool:
    return value is choice or (type(value) is type(choice) and value == choice)


def check_flag(name: str, value: object) -> None:
    """Check that an option is True or False; text such as "no", 0 and 1 are not.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.

    Raises:
        ValueError: If `value` is neither.
    """
    check_choice(name, plain_scalar(value), (True, False))


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
    number = _as_float(value)
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
    raise ValueError(f"{name} is {describe_value(value)}; allowed: {allowed}{_note(meaning)}")


def _as_float(value: object) -> float:
    """A number as float; nan for what is no number, inf for one that no float holds."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


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


def check_whole_number(
    name: str,
    value: object,
    *,
    minimum: int = 1,
    maximum: int = MAX_WHOLE_NUMBER,
    meaning: str = "",
) -> None:
    """Check that a value is a whole number; a float is none.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given; a bool is no number.
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        meaning: What the number means, with its unit, for the message.

    Raises:
        ValueError: If `value` is not such a number.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    number = int(value) if isinstance(value, Integral) else 0
    if is_whole and minimum <= number <= maximum:
        return
    too_large = is_whole and number > maximum
    limit = f" up to {maximum}" if too_large or maximum < MAX_WHOLE_NUMBER else ""
    raise ValueError(
        f"{name} is {describe_value(value)}; allowed: a whole number from {minimum}{limit}"
        f"{_note(meaning)}"
    )


def check_temperature(temperature: object) -> None:
    """Check that a temperature (no unit) is a number above 0 with which a loss can be computed.

    Args:
        temperature: What was given.

    Raises:
        ValueError: If it is no number above 0, or outside of 0.001 to 10,000, where the loss has no
            correct digit in float32.
    """
    check_positive("temperature", temperature)
    if not MIN_TEMPERATURE <= _as_float(temperature) <= MAX_TEMPERATURE:
        raise ValueError(
            f"temperature is {describe_value(temperature)}; allowed: from {MIN_TEMPERATURE:g} up "
            f"to {MAX_TEMPERATURE:g} (beyond, float32 holds no digit of the loss; papers use 1 to "
            "20)"
        )
