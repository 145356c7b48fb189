"""Names: a registry remembers what was registered under which name, and answers a wrong name with the nearest ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase for error messages: "; did you mean 'a', 'b'?" or an empty string."""
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""


class Registry(Generic[T]):
    """Objects of one kind by name. `kind` is the word that error messages use."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Decorator; a name that is taken is an error."""

        def store(item: T) -> T:
            if name in self._items:
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: {self._items[name]} and {item}"
                )
            self._items[name] = item
            return item

        return store

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            hint = suggestion(str(name), self._items) or "."
            raise ValueError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self.names())}")
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def names(self) -> list[str]:
        return sorted(self._items)


def keyword_defaults(function: Callable) -> dict[str, Any]:
    """Keyword-only parameters of `function`, the options a user may set, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def keyword_options(function: Callable) -> list[str]:
    """Names of the options that `function` takes."""
    return list(keyword_defaults(function))
