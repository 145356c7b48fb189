"""Recipes: a frozen dataclass with every number, whose fields are the flags of the script."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def parse(config: type[T], doc: str | None = None, argv: list[str] | None = None) -> T:
    """`config` (a dataclass) with the values that the command line gives; --help shows each field and its comment."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    notes = _comments(config, sys._getframe(1).f_globals.get("__file__"))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        default: Any = field.default
        kind = (
            _flag
            if isinstance(default, bool)
            else type(default[0])
            if isinstance(default, tuple)
            else type(default)
        )
        many = "+" if isinstance(default, tuple) else None
        text = f"{notes.get(field.name, '')} (default {default!r})".replace("%", "%%")
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, nargs=many, default=default, help=text
        )
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"


def _comments(config: type, caller: str | None) -> dict[str, str]:
    """The comment behind each field. A class of "__main__" is looked for in the file that calls parse()."""
    main = config.__module__ == "__main__"
    path = caller if main else getattr(sys.modules.get(config.__module__), "__file__", None)
    if path is None or not Path(path).is_file():
        return {}
    text = Path(path).read_text(encoding="utf-8")
    body = re.search(rf"^class {config.__name__}\b.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return dict(
        re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", body.group() if body else "", re.MULTILINE)
    )
