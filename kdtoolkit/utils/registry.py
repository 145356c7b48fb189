"""Objects by name; a wrong name is answered with the nearest known ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SIMILARITY = 0.5  # of two names, 0 to 1, from which one is suggested for the other


def suggestion(name: str, known: Iterable[str], count: int = 3) -> str:
    """Phrase for an error message that names the known names most like a wrong one.

    Args:
        name: The wrong name.
        known: All names that exist.
        count: Most names to suggest.

    Returns:
        "; did you mean 'a', 'b'?", or "" where no name is similar.
    """
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=count, cutoff=SIMILARITY)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""


class Registry(Generic[T]):
    """Objects of one kind by name.

    Args:
        kind: Word for the objects in error messages, such as "loss".

    Attributes:
        kind: The same word.

    Example:
        >>> losses = Registry("loss")
        >>> @losses.add("mine")
        ... class Mine: ...
        >>> losses["mine"] is Mine
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an object.

        Args:
            name: The name it gets.

        Returns:
            A decorator that returns the object itself.

        Raises:
            ValueError: From the decorator, if the name is taken.
        """

        def register(item: T) -> T:
            if name in self._items:
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: {self._items[name]} and {item}"
                )
            self._items[name] = item
            return item

        return register

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            hint = suggestion(str(name), self._items) or "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self.names())}")
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._items)


def keyword_defaults(function: Callable[..., object]) -> dict[str, Any]:
    """Keyword-only parameters of a function, which are the options that a user may set.

    Args:
        function: Any function or class.

    Returns:
        Their defaults by name; `inspect.Parameter.empty` for one without.
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def keyword_options(function: Callable[..., object]) -> list[str]:
    """Names of the keyword-only parameters of a function.

    Args:
        function: Any function or class.

    Returns:
        The names, in their order.
    """
    return list(keyword_defaults(function))
