"""Paths that users give: the home folder is put in the place of `~`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kdtoolkit.utils.validation import describe_value


def is_path_like(value: object) -> bool:
    """Whether a value is a path or text, or a list of only these.

    Args:
        value: Any value.
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_path_like, value))
    return isinstance(value, (str, os.PathLike))


def expand_home(value: Any) -> Any:
    """Put the home folder in the place of a leading `~`, also behind "local-dir:".

    Args:
        value: A path, text, a list of these, or anything else.

    Returns:
        The same kind of value; what is no path that begins with `~` as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(expand_home(item) for item in value)
    if isinstance(value, str):
        prefix = "local-dir:" if value.startswith("local-dir:") else ""
        path = value.removeprefix(prefix)
        return prefix + os.path.expanduser(path) if path.startswith("~") else value
    if isinstance(value, Path) and value.parts[:1] and value.parts[0].startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value


def check_path(name: str, value: object, meaning: str) -> Path:
    """Check that a value is a path, and put the home folder in the place of a leading `~`.

    Args:
        name: Name of the option, as the user writes it.
        value: What was given.
        meaning: What the path is of, for the message.

    Returns:
        The path.

    Raises:
        ValueError: If it is no path, empty, or begins with the `~` of a user that does not exist.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        where = " ('.' is the current folder)" if text == "" else ""
        raise ValueError(f"{name} is {describe_value(value)}; allowed: {meaning}{where}")
    path = Path(expand_home(text))
    if path.parts[0].startswith("~") and not text.startswith("./"):
        raise ValueError(
            f"{name} is {text!r}: there is no user {path.parts[0][1:]!r} whose home folder that "
            f"is; write './{text}' for a folder of this name"
        )
    return path
