"""Fields that name folders of a run: their types, and the home folder in the place of `~`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

from kdtoolkit.utils.paths import check_path, expand_home, is_path_like
from kdtoolkit.utils.validation import describe_value, plain_scalar

# fields of networks and data that may be paths; those of the output are checked below
PATH_FIELDS = (
    "teacher", "student", "teacher_dir", "student_weights", "teacher_weights", "train_data",
    "eval_data", "data_path",
)  # fmt: skip
Part = TypeVar("Part")


def with_home_folders(part: Part) -> Part:
    """A part of a configuration, in which the home folder is in the place of every `~`.

    Args:
        part: One of the parts.

    Returns:
        The part itself where no path begins with `~`, else a changed copy.
    """
    names = [field.name for field in dataclasses.fields(part) if field.name in PATH_FIELDS]  # type: ignore[arg-type]
    own = {name: getattr(part, name) for name in names}
    found = {name: expand_home(value) for name, value in own.items() if is_path_like(value)}
    changed = {name: value for name, value in found.items() if value != own[name]}
    return dataclasses.replace(part, **changed) if changed else part  # type: ignore[type-var]


def check_output_paths(output_dir: object, resume: object, baseline: object) -> dict[str, Any]:
    """Check the fields of a configuration that name folders of runs.

    Args:
        output_dir: A path, or None.
        resume: False, True, "auto" or the path of a checkpoint; None is False.
        baseline: A path, a result, True, False or None.

    Returns:
        The fields, with `~` expanded.

    Raises:
        ValueError: For a value of another type, and for an empty path.
    """
    if output_dir is not None:
        check_path("output_dir", output_dir, "the path of a folder, or None")
    return {
        "output_dir": expand_home(output_dir),
        "resume": _checked_resume(resume),
        "baseline": _checked_baseline(baseline),
    }


def _checked_resume(resume: object) -> Any:
    plain = plain_scalar(resume)
    if plain is None:
        return False
    if isinstance(plain, bool) or plain == "auto":
        return plain
    check_path("resume", plain, "False, True, 'auto', or the path of a checkpoint's folder")
    return expand_home(plain)


def _checked_baseline(baseline: object) -> Any:
    plain = plain_scalar(baseline)
    is_mark = isinstance(plain, dict) and set(plain) == {"object"}  # of a file, see config_file
    if plain is None or isinstance(plain, bool) or is_mark:
        return plain
    if isinstance(plain, (str, os.PathLike)):
        check_path("baseline", plain, "the folder of a run, its result, True or None")
        return expand_home(plain)
    if not hasattr(plain, "output_dir") or not hasattr(plain, "metrics"):
        raise ValueError(
            f"baseline is {describe_value(plain)}; allowed: the folder of a finished run, its "
            "DistillResult, True (it is trained first) or None"
        )
    return baseline
