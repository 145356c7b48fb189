"""Values of the configuration as a shell writes them: text to a Python value and back.

Each class stands in the configuration's annotations for a value of several types; the command line
(`kdtoolkit.cli`) reads `metavar`, `many` and `parse` from it. None of them is ever instantiated.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from typing import Any


def parse_literal(text: str) -> Any:
    """A Python literal (`2`, `0.5`, `None`, `[1, 2]`, `true`), else the text itself.

    Args:
        text: A value as it was typed; "true" and "false" in any case.

    Returns:
        The value, or `text` where it is no literal.
    """
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def parse_pairs(words: list[str]) -> dict[str, Any]:
    """`["a=1", "b=x"]` -> `{"a": 1, "b": "x"}`.

    Raises:
        ValueError: If a word is not NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{word!r}: write NAME=VALUE")
        found[name] = parse_literal(value)
    return found


class _AnyValue(type):
    """Every value is an instance: a default may be None, a number or text."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class ShellValue(metaclass=_AnyValue):
    """A value that the command line reads from one word, or from several.

    Attributes:
        metavar: What `--help` shows in its place.
        many: Whether several words are read.
    """

    metavar = "TEXT"
    many = False

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The value of the words that were given."""
        return words[0]

    @staticmethod
    def show(value: Any) -> list[str]:
        """The words that give a value, for defaults in `--help`."""
        if value is None:
            return ["none"]
        if isinstance(value, Mapping):
            return [f"{name}={item}" for name, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [str(item) for item in value]
        return [str(value)]


class Text(ShellValue):
    """Text, taken as it is: a name, a path, a Hub id."""

    metavar = "NAME|PATH"


class Texts(ShellValue):
    """One text, or a list of several."""

    metavar = "NAME [NAME ...]"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The text, or a list of several."""
        return words[0] if len(words) == 1 else list(words)


class Scalar(ShellValue):
    """A whole number, a number, true or false, or else text."""

    metavar = "VALUE"

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The narrowest value that the word can be read as."""
        text = words[0]
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
        return text


class Whole(ShellValue):
    """A whole number, or `none`; other text stays text, which the configuration refuses."""

    metavar = "INT"

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The number, None, or the text."""
        return _number(words[0], int)


class Real(ShellValue):
    """A number, or `none`; other text stays text, which the configuration refuses."""

    metavar = "FLOAT"

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The number, None, or the text."""
        return _number(words[0], float)


def _number(text: str, *kinds: type[int] | type[float]) -> Any:
    if text.lower() == "none":
        return None
    for kind in (*kinds, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


class Values(ShellValue):
    """A mapping, as NAME=VALUE words."""

    metavar = "NAME=VALUE [...]"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The mapping."""
        return parse_pairs(words)


class Colour(ShellValue):
    """A name of a colour, or three numbers from 0 to 255."""

    metavar = "NAME|R G B"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The name, None of "none", or the three numbers."""
        if len(words) == 1:
            return None if words[0].lower() == "none" else words[0]
        return tuple(parse_literal(word) for word in words)


class NumberPair(ShellValue):
    """Two numbers, or `none`."""

    metavar = "LOW HIGH"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The pair; None of the single word "none"."""
        if [word.lower() for word in words] == ["none"]:
            return None
        return tuple(parse_literal(word) for word in words)


class LayerPairs(ShellValue):
    """`auto`, or STUDENT:TEACHER pairs of taps: stage numbers or module names."""

    metavar = "auto|STUDENT:TEACHER [...]"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """`"auto"`, or a list of (student tap, teacher tap)."""
        if words == ["auto"]:
            return "auto"
        return [_tap_pair(word) for word in words]

    @staticmethod
    def show(value: Any) -> list[str]:
        """The words of a list of pairs."""
        return [value] if isinstance(value, str) else [f"{s}:{t}" for s, t in value]


class ColumnPair(ShellValue):
    """The columns of the image and the label, `none` for one that is to be found."""

    metavar = "IMAGE LABEL"
    many = True

    @staticmethod
    def parse(words: list[str]) -> Any:
        """The pair; None of the single word "none"."""
        found = [None if word.lower() == "none" else word for word in words]
        return None if found == [None] else tuple(found)


def _tap_pair(word: str) -> tuple[int | str, int | str]:
    student, colon, teacher = word.partition(":")
    if not (student and colon and teacher):
        raise ValueError(f"{word!r}: write STUDENT:TEACHER, e.g. 2:3 or layer2:layer3")
    numbers = [int(t) if t.removeprefix("-").isdecimal() else t for t in (student, teacher)]
    return numbers[0], numbers[1]
