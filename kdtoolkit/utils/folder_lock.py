"""The lock of a run's folder: one run at a time writes to it.

The system releases the lock when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from kdtoolkit.utils.io import write_json

STATE_FOLDER = ".kdtoolkit"  # in a run's folder: what the toolkit itself needs to know of it
LOCK_FILE = "lock"
HOLDER_FILE = "holder.json"

logger = logging.getLogger(__name__)


class OutputDirInUse(ValueError):
    """Another run is writing to the output folder."""


class FolderLock:
    """The lock of one folder. A second one on the same folder is refused, in this process too.

    Args:
        folder: Folder of the run, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state = folder / STATE_FOLDER
        self._lock = FileLock(self._state / LOCK_FILE)

    def acquire(self) -> None:
        """Take the lock and write down who holds it.

        A file system without locks gives a warning.

        Raises:
            OutputDirInUse: If another run holds it.
            OSError: If the folder cannot be written to.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise _in_use(self.folder) from None
        except NotImplementedError as error:  # raised by some network file systems
            logger.warning("%s: the folder cannot be locked: %s", self.folder, error)
            return
        try:
            write_json(self._state / HOLDER_FILE, _this_process())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self._state / HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()


def is_in_use(folder: Path) -> bool:
    """Whether a run is writing to a folder; nothing is created.

    Args:
        folder: Folder of a run, which may not exist.
    """
    path = folder / STATE_FOLDER / LOCK_FILE
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False  # what cannot be locked, or not be written to, is found when it is
    lock.release()
    return False


def check_not_in_use(folder: Path) -> None:
    """Check that no run is writing to a folder; nothing is created.

    Args:
        folder: Folder of a run, which may not exist.

    Raises:
        OutputDirInUse: If a run holds its lock.
    """
    if is_in_use(folder):
        raise _in_use(folder)


def _this_process() -> dict[str, object]:
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "start": started}


def _in_use(folder: Path) -> OutputDirInUse:
    holder = {}
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads((folder / STATE_FOLDER / HOLDER_FILE).read_text(encoding="utf-8"))
    who = "another process"
    if isinstance(holder, dict) and holder:
        who = "process {} on {}, since {}".format(
            *(holder.get(name, "?") for name in ("pid", "host", "start"))
        )
    return OutputDirInUse(
        f"{folder} is in use by another run ({who}): wait for its end, stop it, or give another "
        "output_dir"
    )
