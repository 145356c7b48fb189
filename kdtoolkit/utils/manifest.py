"""The manifest of a run's folder: which of the files in it the run has written.

Only files of the manifest are ever removed. While a run is writing, and after it was killed, what
has one of the names that a run writes counts as its own: other files of these names are refused
before it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from kdtoolkit.utils.folder_lock import STATE_FOLDER
from kdtoolkit.utils.io import write_json

MANIFEST_FILE = "manifest.json"
FORMAT = 1
TEXT_FILES = (
    "config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md",
    "finetuned.json",
)  # fmt: skip
FIGURES = ("accuracy.png", "eval_loss.png", "loss.png", "gradcam.png")
FOLDERS = ("checkpoints", "checkpoints/last", "checkpoints/best", "student", "networks", "figures")
# Names that a run writes to, in patterns: * is a part of a name, /** everything in a folder.
WRITTEN = (
    *TEXT_FILES,
    *(f".{name}.tmp" for name in TEXT_FILES),
    *(f"figures/{name}" for name in FIGURES),
    "figures/.*",
    "checkpoints/last/**", "checkpoints/best/**", "checkpoints/.*/**",
    "student/model.safetensors", "student/config.json", ".student-*/**", ".student.*/**",
    "networks/*/model.safetensors", "networks/*/config.json", "networks/.*/**",
)  # fmt: skip
# Folders to which a run adds files of new names.
ADDED_TO = ("trackers/**",)
RUNS_INSIDE = ("baseline", "finetuned", "teacher")  # folders of further runs
IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".gitignore")


@dataclasses.dataclass
class Manifest:
    """What a run has written to its folder.

    Attributes:
        folder: Folder of the run.
        files: Paths of the files, relative to the folder.
        claims: Patterns of names that count as the run's own, while it is writing.
        foreign: Files of such names that were there before.
        runs: Folders in this one that hold runs which this one made: a baseline, teachers.
        finished: Whether the run has written its result.
        replacing: Whether files of an earlier run are set aside until this one has a checkpoint.
        settings: What must match to resume; empty before training begins.
    """

    folder: Path
    files: set[str] = dataclasses.field(default_factory=set)
    claims: tuple[str, ...] = ()
    foreign: set[str] = dataclasses.field(default_factory=set)
    runs: set[str] = dataclasses.field(default_factory=set)
    finished: bool = False
    replacing: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def owns(self, path: str) -> bool:
        """Whether the run wrote a file.

        Args:
            path: Path relative to the folder.
        """
        if path in self.files:
            return True
        return path not in self.foreign and matches(path, self.claims)

    def claim_names(self) -> None:
        """From here on the run writes: what gets one of its names is its own."""
        present = list(walk_files(self.folder))
        self.foreign = {p for p in present if matches(p, ADDED_TO) and not self.owns(p)}
        self.claims = (*WRITTEN, *ADDED_TO)

    def settle(self) -> None:
        """The run writes no more: its files are listed one by one, the others are the user's."""
        self.files = {path for path in walk_files(self.folder) if self.owns(path)}
        self.claims, self.foreign = (), set()

    def present(self) -> list[str]:
        """Files of the run that are there, in order."""
        return sorted(path for path in walk_files(self.folder) if self.owns(path))

    def write(self) -> None:
        """Write the manifest."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del data["folder"]
        plain = {name: sorted(v) if isinstance(v, set) else v for name, v in data.items()}
        write_json(self.folder / STATE_FOLDER / MANIFEST_FILE, {"format": FORMAT, **plain})


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a relative path has one of the names that patterns stand for.

    Args:
        path: Path with "/" between its parts.
        patterns: Patterns as in `WRITTEN`.
    """
    parts = path.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        given = parts
        if wanted[-1] == "**":
            wanted, given = wanted[:-1], parts[: len(wanted) - 1]
            if len(parts) <= len(wanted):
                continue
        if len(given) == len(wanted) and all(map(fnmatch.fnmatchcase, given, wanted)):
            return True
    return False


def is_in_the_way(folder: Path, path: str) -> bool:
    """Whether a run would write over a file, or cannot write because it is there.

    Args:
        folder: Folder of the run.
        path: Path of the file relative to it.
    """
    first, slash, _ = path.partition("/")
    no_folder = path in FOLDERS and not (folder / path).is_dir()  # a link to a folder is one
    return matches(path, WRITTEN) or no_folder or (bool(slash) and first in TEXT_FILES)


def walk_files(folder: Path) -> Iterator[str]:
    """Paths of all files in a folder and the folders in it, without what the toolkit keeps there.

    A symbolic link counts as a file and is not followed.

    Args:
        folder: The folder, which may not exist.

    Yields:
        Paths relative to the folder, with "/" between their parts.

    Raises:
        OSError: If a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for root, folders, files in os.walk(folder, onerror=fail):
        relative = Path(root).relative_to(folder)
        if root == str(folder) and STATE_FOLDER in folders:
            folders.remove(STATE_FOLDER)
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in (*files, *links):
            yield (relative / name).as_posix()


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a run's folder.

    A folder of an earlier version, which has no manifest, is recognised by its config.yaml together
    with a checkpoint or a metrics.jsonl; files of the names that a run writes are its own.

    Args:
        folder: The folder, which may not exist.

    Returns:
        The manifest; None for a folder without a run of ours.

    Raises:
        ValueError: If the manifest is damaged.
    """
    path = folder / STATE_FOLDER / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _manifest_of_earlier_version(folder)
    try:
        data = json.loads(text)
        names = [field.name for field in dataclasses.fields(Manifest)[1:]]
        values = {name: data[name] for name in names}
        for name in ("files", "foreign", "runs"):
            values[name] = {path for path in values[name] if _is_inside(path)}
        return Manifest(folder, **values | {"claims": tuple(values["claims"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), so it is not known which files of {folder} are a run's: "
            "give another output_dir, or move what you want to keep and delete the folder"
        ) from error


def _is_inside(path: object) -> bool:
    """Whether a path of a manifest stays in the folder."""
    if not isinstance(path, str) or not path:
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in path


def _manifest_of_earlier_version(folder: Path) -> Manifest | None:
    checkpoints = [folder / "checkpoints" / name / "checkpoint.json" for name in ("last", "best")]
    is_run = _is_our_config(folder / "config.yaml") and (
        any(_is_json_with(path, "total_steps") for path in checkpoints)
        or _is_json_with(folder / "metrics.jsonl", "event")
    )
    if not is_run:
        return None
    found = Manifest(folder, claims=WRITTEN)
    runs = (path.relative_to(folder).as_posix() for path in inner_runs(folder))
    found.runs = {path for path in runs if not path.startswith("teacher")}
    found.settle()
    found.finished = (folder / "student" / "config.json").is_file()
    return found


def _is_our_config(path: Path) -> bool:
    """Whether a file is the config.yaml of a run: in parts, or flat as older runs wrote it."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict):
            parts = {"networks", "data", "loss", "optim", "output"} <= config.keys()
            return parts or {"student", "method", "train_data"} <= config.keys()
    return False


def _is_json_with(path: Path, key: str) -> bool:
    """Whether a file, or its first line, is a JSON object that has a key."""
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = text.partition("\n")[0]
        data = json.loads(text)
        return isinstance(data, dict) and key in data
    return False


def inner_runs(folder: Path) -> list[Path]:
    """Folders of runs in the folder of a run: a baseline, fine-tuned teachers.

    Args:
        folder: The folder, which may not exist.
    """
    found = []
    for name in RUNS_INSIDE:
        own = folder / name
        if own.is_dir() and not own.is_symlink():
            inside = [path for path in sorted(own.iterdir()) if path.is_dir()]
            found += [p for p in (own, *inside) if read_manifest(p) is not None]
    return found


def foreign_files(folder: Path, manifest: Manifest | None) -> Iterator[str]:
    """Files that neither the run nor a run inside its folder has written.

    Args:
        folder: The folder, which may not exist.
        manifest: Of the run; None where there is none.

    Yields:
        Paths relative to the folder.
    """
    inner = {p.relative_to(folder).as_posix(): read_manifest(p) for p in inner_runs(folder)}
    for path in walk_files(folder):
        if path.rpartition("/")[2] in IGNORED or (manifest is not None and manifest.owns(path)):
            continue
        if f"/{STATE_FOLDER}/" in path and path.partition("/")[0] in RUNS_INSIDE:
            continue
        owners = [(at, own) for at, own in inner.items() if path.startswith(f"{at}/")]
        if not any(own is not None and own.owns(path[len(at) + 1 :]) for at, own in owners):
            yield path


def record_files(folder: Path, paths: Iterable[str]) -> None:
    """Add files to the manifest of a folder that has one, such as a report written again later.

    Args:
        folder: Folder of a run, or any other.
        paths: Paths relative to the folder.
    """
    if (folder / STATE_FOLDER / MANIFEST_FILE).is_file():
        manifest = read_manifest(folder)
        there = {path for path in paths if (folder / path).is_file()}
        if manifest is not None and not all(map(manifest.owns, there)):
            manifest.files |= there
            manifest.write()


def remove_files(folder: Path, paths: Iterable[str]) -> None:
    """Remove files, and the folders that are empty then.

    Args:
        folder: Folder of the run, which stays.
        paths: Paths relative to it; those that are not there are left out.
    """
    parents = set()
    for path in paths:
        own = [parent for parent in PurePosixPath(path).parents if parent.parts]
        if any((folder / parent).is_symlink() for parent in own):
            continue  # the user's link to another place
        (folder / path).unlink(missing_ok=True)
        parents |= set(own)
    remove_empty_folders(folder, (str(parent) for parent in parents))


def remove_empty_folders(folder: Path, names: Iterable[str]) -> None:
    """Remove those of some folders that are empty.

    Args:
        folder: Folder of the run.
        names: Paths relative to it.
    """
    for name in sorted(names, key=lambda path: -path.count("/")):
        with contextlib.suppress(OSError):  # not empty, or not there
            (folder / name).rmdir()
