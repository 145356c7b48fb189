"""The files of a checkpoint folder: states, and checkpoint.json with a checksum of every file.

Only files that checkpoint.json lists are read, each of them after its checksum was compared, and
only by safetensors and JSON: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from kdtoolkit.utils.io import atomic_folder, to_plain
from kdtoolkit.utils.state_file import DamagedFile, file_checksum, read_state, write_state

Metadata: TypeAlias = dict[str, Any]  # plain numbers, strings, lists and dicts, as in JSON

METADATA_FILE = "checkpoint.json"
FORMAT = 2  # 1 was written by accelerate, with pickles in it
NO_CHECKSUM = "0" * 64  # stands for the checksum of checkpoint.json while that is computed


class OtherVersion(DamagedFile):
    """A checkpoint was written by another version of this package."""


def write_checkpoint(folder: Path, states: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint; an earlier one in the folder stays whole until the new one is.

    Args:
        folder: Folder of the checkpoint.
        states: Name of a file, without suffix -> the state that it will hold.
        metadata: What is known of the run.

    Raises:
        OSError: If it could not be written.
        UnsupportedState: If a state holds what a checkpoint cannot save.
    """
    with atomic_folder(folder) as temporary:
        files = {}
        for name, state in states.items():
            path = temporary / f"{name}.safetensors"
            write_state(path, state)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_checksum(path)}
        _write_metadata(temporary / METADATA_FILE, {**metadata, "format": FORMAT, "files": files})


def _write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    draft = json.dumps(to_plain({**metadata, "checksum": NO_CHECKSUM}), indent=2) + "\n"
    path.write_text(draft.replace(NO_CHECKSUM, _checksum_of_text(draft)), encoding="utf-8")


def _checksum_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint, and no others, as atomically as `write_checkpoint`.

    Args:
        source: Folder of the checkpoint.
        target: Folder of the copy, which replaces an earlier one.

    Raises:
        DamagedFile: If the source is no checkpoint.
        OSError: If the copy could not be written.
    """
    names = [*read_checked_metadata(source)["files"], METADATA_FILE]
    with atomic_folder(target) as temporary:
        for name in names:
            shutil.copyfile(source / name, temporary / name)


def read_checked_metadata(folder: Path) -> Metadata:
    """Read checkpoint.json.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The metadata, with "format" and "files".

    Raises:
        OtherVersion: If it was written by another version of this package.
        DamagedFile: If the file is missing or damaged.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        raise DamagedFile(f"{folder} holds no checkpoint ({METADATA_FILE} is missing)")
    try:
        text = path.read_bytes().decode()
        metadata = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise DamagedFile(f"{path} is damaged: it holds no metadata")
    if "checksum" not in metadata and "format" not in metadata:
        raise OtherVersion(
            f"{folder} was written by an earlier version of kdtoolkit, whose checkpoints hold "
            "pickled objects: this version does not read them"
        )
    found = str(metadata["checksum"]) if "checksum" in metadata else NO_CHECKSUM
    if _checksum_of_text(text.replace(found, NO_CHECKSUM)) != found:
        raise DamagedFile(f"{path} is damaged: its checksum is another one")
    if metadata.get("format") != FORMAT:
        raise OtherVersion(
            f"{folder} is a checkpoint of format {metadata.get('format')}; this version of "
            f"kdtoolkit reads format {FORMAT}"
        )
    _check_listed_files(path, metadata.get("files"))
    return metadata


def _check_listed_files(path: Path, files: Any) -> None:
    """Check that the names are those of files in the folder itself."""
    good = isinstance(files, dict) and all(
        Path(name).name == name and name.endswith(".safetensors") and isinstance(entry, dict)
        for name, entry in files.items()
    )
    if not good:
        raise DamagedFile(f"{path} is damaged: it lists other files than a checkpoint has")


def check_files(folder: Path, names: Iterable[str] | None = None) -> Metadata:
    """Compare the checksums of the files of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        names: Names without suffix; None takes all.

    Returns:
        The metadata.

    Raises:
        DamagedFile: If a file is missing or not as it was written.
    """
    metadata = read_checked_metadata(folder)
    files = metadata["files"]
    for name in files if names is None else [f"{name}.safetensors" for name in names]:
        if name not in files:
            raise DamagedFile(f"{folder / METADATA_FILE} does not list {name}")
        _check_file(folder / name, files[name])
    return metadata


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise DamagedFile(f"{path} is missing")
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise DamagedFile(f"{path} is damaged: {size} bytes, {entry.get('bytes')} were written")
        if file_checksum(path) != entry.get("sha256"):
            raise DamagedFile(f"{path} is damaged: its checksum is another one")
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from error


def read_states(folder: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Read the states of a checkpoint, after their checksums were compared.

    Args:
        folder: Folder of the checkpoint.
        names: Names without suffix; None takes all.

    Returns:
        Name -> state.

    Raises:
        DamagedFile: If a file is missing, damaged, or no state.
    """
    wanted = None if names is None else list(names)
    metadata = check_files(folder, wanted)
    if wanted is None:
        wanted = [Path(name).stem for name in metadata["files"]]
    return {name: read_state(folder / f"{name}.safetensors") for name in wanted}


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a checkpoint all of whose files are as they were written.

    Args:
        folder: The folder.
    """
    try:
        check_files(folder)
    except DamagedFile:
        return False
    return True
