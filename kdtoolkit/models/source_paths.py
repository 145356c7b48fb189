"""Paths that users give for a network: a run's folder stands for the student in it."""

from __future__ import annotations

from pathlib import Path

RUN_FILES = ("config.yaml", "metrics.jsonl", "checkpoints")  # a run's folder holds one of them


def student_of_run(path: Path) -> Path:
    """The exported student of a run, for the run's folder.

    A run exports one network, so its folder means that one.

    Args:
        path: A folder, or anything else.

    Returns:
        `path/student` for the folder of a run that has exported its student; else `path` itself.
    """
    has_student = (path / "student" / "config.json").is_file()
    return path / "student" if has_student and not (path / "config.json").exists() else path


def is_unfinished_run(path: Path) -> bool:
    """Tell whether a folder is that of a run without an exported student.

    Args:
        path: A folder.

    Returns:
        True where files of a run are in it.
    """
    return any((path / name).exists() for name in RUN_FILES)
