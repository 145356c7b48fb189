"""The registered methods as a table, and one of them with its options."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from kdtoolkit.core.registries import LOSSES, METHODS
from kdtoolkit.core.strategy import MethodSpec, StrategySpec
from kdtoolkit.methods.factory import list_methods
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import keyword_defaults


@dataclass(frozen=True)
class MethodOption:
    """An option of a method.

    Attributes:
        name: Keyword of `distill()`.
        default: Its default.
        meaning: What it is, from the documentation of the loss or strategy.
    """

    name: str
    default: Any
    meaning: str


def default_sum(spec: MethodSpec) -> str:
    """The default losses of a method, as "0.1 ce + 0.9 kd"; an arrow marks a rising weight.

    Args:
        spec: The method.

    Returns:
        Its losses in their order, each with its weight; "" if it has none.
    """
    terms = [f"{_weight(weight)} {name}" for name, weight in spec.losses.items()]
    return " + ".join(terms)


def _weight(weight: LossWeight) -> str:
    if isinstance(weight, (int, float)):
        return f"{weight:g}"
    return f"{getattr(weight, 'weight', weight):g}↑"


def method_options(name: str) -> list[MethodOption]:
    """The options of a method.

    Args:
        name: A registered name.

    Returns:
        One entry an option, those of a strategy or of all its losses.
    """
    spec = METHODS[name]
    if isinstance(spec, StrategySpec):
        return _options(spec.build, spec.build)
    found: dict[str, MethodOption] = {}
    for loss in spec.losses:
        cls = LOSSES[loss]
        found |= {option.name: option for option in _options(cls.__init__, cls)}
    return list(found.values())


def _options(function: Any, documented: Any) -> list[MethodOption]:
    meanings = argument_texts(inspect.getdoc(documented) or "")
    return [
        MethodOption(name, default, meanings.get(name, ""))
        for name, default in keyword_defaults(function).items()
    ]


def argument_texts(doc: str) -> dict[str, str]:
    """Argument -> text, of the `Args:` section of a Google-style docstring.

    Args:
        doc: The docstring without indentation, as `inspect.getdoc` gives it.

    Returns:
        One entry an argument, its lines joined by spaces; empty without such a section.
    """
    texts: dict[str, str] = {}
    inside, current = False, ""
    for line in doc.splitlines():
        if line.strip() == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     "):
            current, _, text = line.strip().partition(": ")
            texts[current] = text
        elif inside and line.strip() and current:
            texts[current] += f" {line.strip()}"
    return texts


def print_methods() -> None:
    """Print every method: name, default sum, title."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "default sum", "what it is", box=box.SIMPLE_HEAD)
    for name in list_methods():
        spec = METHODS[name]
        table.add_row(name, default_sum(spec), spec.title)
    console = Console()
    console.print(table)
    console.print("kdtoolkit methods NAME shows the options of a method.", highlight=False)


def print_method(name: str) -> None:
    """Print one method with its options, their defaults and meaning.

    Args:
        name: A registered name.

    Raises:
        ValueError: If it is unknown, with the nearest names.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    spec, console = METHODS[name], Console()
    console.print(f"[bold]{name}[/bold]: {spec.title}", highlight=False)
    console.print(f"default sum: {default_sum(spec)}", highlight=False)
    options = method_options(name)
    if not options:
        console.print("no options", highlight=False)
        return
    table = Table("option", "default", "meaning", box=box.SIMPLE_HEAD)
    for option in options:
        table.add_row(option.name, repr(option.default), option.meaning)
    console.print(table)
