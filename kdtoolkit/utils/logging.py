"""The handler of the package's logger: plain messages on the terminal, through rich."""

from __future__ import annotations

import logging
import os

LOGGER = "kdtoolkit"


def configure_logging(level: int | str | None = None, *, rank: int | None = None) -> logging.Logger:
    """Show the messages of the logger "kdtoolkit" on the terminal.

    The logger gets one handler, once, and only where nothing handles its messages yet: an
    application that has configured logging itself keeps its own handlers. The root logger is not
    changed.

    Args:
        level: Lowest level that is shown; None keeps the level that the logger has, or sets INFO
            where it has none.
        rank: Number of this process, from 0; None reads the environment variable RANK. Ranks other
            than 0 show nothing below WARNING.

    Returns:
        The logger.
    """
    logger = logging.getLogger(LOGGER)
    if level is not None:
        logger.setLevel(level)
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    process = int(os.environ.get("RANK", "0")) if rank is None else rank
    if process > 0:
        logger.setLevel(max(logger.level, logging.WARNING))
    if not logger.hasHandlers():
        logger.addHandler(_make_terminal_handler())
    return logger


def _make_terminal_handler() -> logging.Handler:
    from rich.logging import RichHandler

    handler = RichHandler(show_time=False, show_level=False, show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
