"""An error that names a row, and reads the same from a worker process."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
END = object()


class RowError(ValueError):
    """A row that cannot be read.

    A DataLoader raises the error of a worker again, with the worker's traceback as its message;
    here only the sentence of that traceback's last error is kept.

    Args:
        message: The sentence, or a traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.RowError: ")[2].strip())


@contextmanager
def without_traceback() -> Iterator[None]:
    """Context in which an error of ours reads the same from a worker process.

    Yields:
        Nothing; the block runs.

    Raises:
        RowError: In place of any ValueError, with its text.
    """
    try:
        yield
    except RowError:
        raise
    except ValueError as error:
        raise RowError(str(error)) from error


@contextmanager
def raised_by_user(where: str, what: str) -> Iterator[None]:
    """Name the row where the user's code raises.

    Args:
        where: Start of the message: the split and the row.
        what: What raises, such as "the data set".

    Yields:
        Nothing; the block runs.

    Raises:
        RowError: In place of any error, with its type, its text and the line that raised it.
    """
    try:
        yield
    except RowError:
        raise
    except Exception as error:
        raise RowError(f"{where}: {what} raised {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Describe an error in a line.

    Args:
        error: The error.

    Returns:
        Its type, its text, and file and line of the code that raised it.
    """
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def enumerate_items(items: Iterable[T], where: str, what: str) -> Iterator[tuple[int, T]]:
    """Count the items of the user's iterable, and name the one that raises.

    Args:
        items: The iterable.
        where: Start of the message, which the number is put behind.
        what: What raises, such as "the stream".

    Yields:
        Number and item.

    Raises:
        RowError: As `raised_by_user`.
    """
    with raised_by_user(f"{where}0", what):
        source = iter(items)
    for number in itertools.count():
        with raised_by_user(f"{where}{number}", what):
            item = next(source, END)
        if item is END:
            return
        yield number, item  # type: ignore[misc]
