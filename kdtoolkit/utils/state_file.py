"""A state in one .safetensors file: its tensors, and its structure and plain values as metadata.

Nothing in such a file is ever executed: it is read by safetensors and by JSON alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kdtoolkit.utils.io import apply_umask
from kdtoolkit.utils.state_tree import PackedState, pack_state, unpack_state

STATE_KEY = "state"  # of the metadata: structure and plain values, as JSON
BLOCK = 1 << 20  # bytes that are read at once


class DamagedFile(ValueError):
    """A file is missing, incomplete, changed, or not what it should be."""


def write_state(path: Path, state: object) -> None:
    """Write a state to a new file, which is not atomic by itself.

    Args:
        path: The file.
        state: The state, see `state_tree`.

    Raises:
        UnsupportedState: If the state holds what a checkpoint cannot save.
        OSError: If the file cannot be written.
    """
    packed = pack_state(state)
    plain = json.dumps(packed.plain, separators=(",", ":"))
    try:
        save_file(packed.tensors, path, metadata={STATE_KEY: plain})
    except SafetensorError as error:
        raise _as_os_error(error, path) from error
    apply_umask(path)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """The error of the system that stands in the message of safetensors."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{path}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def read_state(path: Path) -> Any:
    """Read a state.

    Args:
        path: A file of `write_state`.

    Returns:
        The state; its tensors are on the CPU.

    Raises:
        DamagedFile: If the file is not one of `write_state`, or not complete.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[STATE_KEY]
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return unpack_state(PackedState(json.loads(text), tensors))
    except KeyError as error:
        raise DamagedFile(f"{path} is no state of a checkpoint: {error} is missing") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


def file_checksum(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
