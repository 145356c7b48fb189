"""A file or folder of weights, read without running any code that stands in it.

A .pth, .pt, .bin, .ckpt or .tar file is a pickle. It is only read with `weights_only=True`, which
makes tensors, plain containers, and the types of `PLAIN_TYPES`; anything else is refused by name.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# timm's own names first
PREFERRED_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ALLOWED_TEXT = "a .safetensors file, or a .pth, .pt, .bin, .ckpt or .pth.tar file of tensors"
_DTYPES = (
    *("Bool", "Float16", "Float32", "Float64", "Bytes", "Str", "DateTime64"),
    *(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
)


def _numpy_types() -> list[tuple[Any, str]]:
    """What pickled NumPy scalars and arrays are made of, under the names of NumPy 1 and 2."""
    scalar: Any = np.float64(0).__reduce__()[0]
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    functions = {"scalar": scalar, "_reconstruct": reconstruct}
    named: list[tuple[Any, str]] = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for package in ("numpy.core", "numpy._core"):
        named += [(made, f"{package}.multiarray.{name}") for name, made in functions.items()]
    classes = [f"{name}DType" for name in _DTYPES if hasattr(np.dtypes, f"{name}DType")]
    return named + [(getattr(np.dtypes, name), f"numpy.dtypes.{name}") for name in classes]


def _new_dict(*_: object) -> dict[object, object]:
    """In place of a defaultdict, which `weights_only` cannot fill."""
    return {}


def _new_list(*_: object) -> list[object]:
    """In place of a deque, which `weights_only` cannot fill."""
    return []


# (type, the name under which a pickle asks for it): none of them runs code when it is made
PLAIN_TYPES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_new_dict, "collections.defaultdict"),
    (_new_list, "collections.deque"),
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    *(getattr(np, kind) for kind in ("float64", "float32", "int64", "int32", "bool_")),
    *((kind, f"builtins.{kind.__name__}") for kind in (int, float, bool, str, bytes, complex)),
    *((kind, f"builtins.{kind.__name__}") for kind in (list, tuple, dict, slice, range)),
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure, name in (
            (pathlib.PurePosixPath, "PosixPath"),
            (pathlib.PurePosixPath, "PurePosixPath"),
            (pathlib.PureWindowsPath, "WindowsPath"),
            (pathlib.PureWindowsPath, "PureWindowsPath"),
        )
    ),
    *_numpy_types(),
]


class UnreadableWeights(ValueError):
    """A file or folder is no weights; the message says why."""


def is_weights_file(text: str) -> bool:
    """Tell whether a path is named like a file of weights.

    Args:
        text: Any path or name.

    Returns:
        True for the endings of `SUFFIXES`, in any case.
    """
    return text.lower().endswith(SUFFIXES)


def read_weights(path: Path) -> tuple[object, str | None]:
    """Read a file of weights, or the one in a folder.

    Args:
        path: The file or folder.

    Returns:
        What the file holds, on the CPU; a sentence on which file of a folder was taken where it
        holds several, else None.

    Raises:
        UnreadableWeights: If there is no such file, it is damaged, or it needs anything but
            tensors and plain values.
    """
    if not path.is_dir():
        return _read_file(path), None
    file, others = _find_file(path)
    note = f"{file.name} is taken, not {', '.join(others)}" if others else None
    return _read_file(file), note


def _find_file(folder: Path) -> tuple[Path, list[str]]:
    """The weights in a folder, by timm's order of names, then of endings; names of the others."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and is_weights_file(f.name))
    if not files:
        raise UnreadableWeights(f"no file of weights is in {folder}: expected {ALLOWED_TEXT}")

    def rank(file: Path) -> tuple[int, int]:
        known = file.name in PREFERRED_FILES
        name = PREFERRED_FILES.index(file.name) if known else len(PREFERRED_FILES)
        return name, [file.name.lower().endswith(suffix) for suffix in SUFFIXES].index(True)

    first, *rest = sorted(files, key=rank)
    return first, [file.name for file in rest]


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise UnreadableWeights(f"there is no file {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return _load_plain(path)
    except UnreadableWeights:
        raise
    except Exception as error:  # zip, pickle, safetensors: each has errors of its own
        raise UnreadableWeights(_explain(path, error)) from error


def _load_plain(path: Path) -> object:
    """`torch.load` with tensors and plain values alone."""
    names = _archive_names(path)
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise UnreadableWeights(
            f"{path} is a TorchScript archive, which holds code: load it with torch.jit.load and "
            "pass the module (its logits teach, its features cannot be read), or save the "
            "state_dict() of the network that it was made of"
        )
    if "models/model.json" in names:
        raise UnreadableWeights(
            f"{path} is an exported program of torch.export, which holds code: save the "
            "state_dict() of the network that was exported"
        )
    with torch.serialization.safe_globals(PLAIN_TYPES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other pickle protocols: what they need is checked
        return torch.load(path, map_location="cpu", weights_only=True)


def _archive_names(path: Path) -> list[str]:
    """Names in a zip file without its outermost folder; none for other files."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return [name.partition("/")[2] for name in archive.namelist()]


def _explain(path: Path, error: Exception) -> str:
    wanted = _refused_types(path, error)
    if wanted:
        return (
            f"{path} cannot be read: beside tensors it needs {', '.join(wanted)}, and a file that "
            "makes such objects may run any code. If you trust it, load it yourself and save the "
            "tensors alone: torch.save(net.state_dict(), 'weights.pth')"
        )
    if isinstance(error, SafetensorError):
        return f"{path} is no complete safetensors file: {error}"
    if path.stat().st_size == 0:
        return f"{path} is an empty file"
    if tarfile.is_tarfile(path):
        return (
            f"{path} is in the tar format of PyTorch before 0.1.10, which is read by running the "
            "pickles in it: load it yourself and save the tensors alone with torch.save"
        )
    return f"{path} cannot be read ({_cause(error)}): expected {ALLOWED_TEXT}"


def _cause(error: Exception) -> str:
    """The message of an error, without the advice that torch.load puts around it."""
    text = " ".join(str(error).split())
    text = text.partition("WeightsUnpickler error: ")[2] or text
    return f"{type(error).__name__}: {text.partition(' Check the documentation of')[0]}"


def _refused_types(path: Path, error: Exception) -> list[str]:
    """Names of all types that a file needs and that are not allowed."""
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip file, or a damaged one: the first refused type is in the error
        found = []
    return found or list(dict.fromkeys(re.findall(r"GLOBAL ([\w.<>]+)", str(error))))
