"""Values of the wrong type or out of range, which tests give to every argument."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kdtoolkit

PACKAGE = str(Path(kdtoolkit.__file__).parent)


class TrainingHasBegun(Exception):
    """A value went through to the training loop."""


class Weird:
    """An object of no use."""


def not_a_schedule(clock: Any) -> str:
    return "text"


# label -> value
VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "empty text": "",
    "text": "nonsense",
    "number as text": "1",
    "bytes": b"x",
    "-1": -1,
    "0": 0,
    "1": 1,
    "3": 3,
    "1.5": 1.5,
    "-0.5": -0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "tiny": 1e-300,
    "huge": 1e300,
    "huge whole number": 10**400,
    "complex": 1j,
    "[]": [],
    "[1]": [1],
    "['nonsense']": ["nonsense"],
    "()": (),
    "{}": {},
    "{'nonsense': 1}": {"nonsense": 1},
    "{1: 2}": {1: 2},
    "set": {1, 2},
    "range": range(3),
    "object": Weird(),
    "class": Weird,
    "function": not_a_schedule,
    "tensor of numbers": torch.tensor([1.0, 2.0]),
    "array of text": np.array(["a"]),
    "zero byte": "a\0b",
}
POSITIVE_WHOLE = ("1", "3")
POSITIVE = (*POSITIVE_WHOLE, "1.5", "tiny")
FROM_0 = ("0", *POSITIVE)
SHARE = ("0", "1", "tiny")
FLAG = ("True", "False")
TEXT = ("empty text", "text", "number as text", "zero byte")
NOTHING = ("None", "[]", "()", "{}")


def wrong_values(allowed: tuple[str, ...]) -> dict[str, Any]:
    """All values but those that an argument takes."""
    unknown = set(allowed) - set(VALUES)
    assert not unknown, f"no such values: {unknown}"
    return {label: value for label, value in VALUES.items() if label not in allowed}


def fault_of(call: Callable[[], Any]) -> str | None:
    """What is wrong with the way a call refuses a value; None where it refuses it well."""
    try:
        call()
    except (ValueError, OSError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if not frame.filename.startswith(PACKAGE):
            return f"raised by {frame.filename}:{frame.lineno}: {error!r}"
        return None if len(str(error)) > 20 else f"says too little: {error!r}"
    except TrainingHasBegun:
        return "accepted: training began with it"
    except Exception as error:  # any other is raw
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"raw, from {frame.filename}:{frame.lineno}: {error!r}"
    return "accepted in silence"
