"""Raw labels: whole numbers or text, in columns, arrays and items; all else is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pyarrow as pa

NO_LABEL = -1  # the label of a row without one
MAX_LABEL = 2**53  # up to which floats are exact
ONE_CLASS = "a row has one class: multi-label, one-hot and soft labels are not supported"


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sort names of classes: as numbers where all are whole numbers, else as text.

    Args:
        names: The names, each once.

    Returns:
        The names in the order of the class ids.
    """
    found = list(names)
    if all(_is_whole_number(name) for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def _is_whole_number(name: str) -> bool:
    digits = name.strip().removeprefix("-")
    return digits.isascii() and digits.isdecimal()


def plain_label(value: object, where: str) -> int | str:
    """Turn the label of an item into a whole number or text.

    Args:
        value: What the data set gave.
        where: Start of the message of an error.

    Returns:
        A whole number or text; -1 for None.

    Raises:
        ValueError: If it is neither, such as 0.5, NaN or a vector.
    """
    if value is None:
        return NO_LABEL
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if np.ndim(value) != 0:
            raise _wrong_shape(value, tuple(value.shape), where)
        value = value.item()
    if isinstance(value, (list, tuple)):
        raise _wrong_shape(value, (len(value),), where)
    if isinstance(value, (bool, int)):
        return _in_range(int(value), where)
    if isinstance(value, float):
        return _whole(value, where)
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{where}: the label is {value!r} ({type(value).__name__}), which is not one integer class "
        "id: a whole number from 0 or text is expected"
    )


def _wrong_shape(value: object, shape: tuple[int, ...], where: str) -> ValueError:
    advice = "remove that dimension (squeeze)" if shape == (1,) else ONE_CLASS
    return ValueError(
        f"{where}: the label {_short(value)} has the shape {shape}, it is not one integer class "
        f"id: {advice}"
    )


def _whole(value: float, where: str) -> int:
    if value != value:
        raise ValueError(
            f"{where}: the label is NaN: remove the row, or write None for a row without a label"
        )
    if not float(value).is_integer():
        raise ValueError(
            f"{where}: the label is {value}, which is no class id: labels are whole numbers from "
            "0, or text; soft labels and targets of a regression are not supported"
        )
    return _in_range(int(value), where)


def _in_range(value: int, where: str) -> int:
    if abs(value) > MAX_LABEL:
        raise ValueError(f"{where}: the label {value} is too large for a class id")
    return value


def read_label_values(values: pa.ChunkedArray, split: str) -> np.ndarray:
    """Read a column of labels.

    Args:
        values: The column.
        split: Name of the split, for messages.

    Returns:
        (N,) int64, -1 where the label is null; or (N,) text as objects, None where it is null.

    Raises:
        ValueError: If a label is not a whole number or text; names the row.
    """
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        values = values.cast(kind)
    if pa.types.is_null(kind):
        return np.full(len(values), NO_LABEL, np.int64)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if any(is_text(kind) for is_text in texts):
        return np.array(values.to_pylist(), dtype=object)
    if pa.types.is_floating(kind):
        is_null = values.is_null(nan_is_null=False).to_numpy()
        numbers = values.cast(pa.float64()).fill_null(NO_LABEL).to_numpy()
        return np.where(is_null, NO_LABEL, integral(numbers, split))
    try:
        found: np.ndarray = values.cast(pa.int64()).fill_null(NO_LABEL).to_numpy()
    except pa.ArrowException as e:
        raise ValueError(f"split {split!r}: the labels are not whole numbers or text: {e}") from e
    return found


def integral(numbers: np.ndarray, split: str) -> np.ndarray:
    """Turn floats into whole numbers.

    Args:
        numbers: (N,) floats.
        split: Name of the split, for messages.

    Returns:
        (N,) int64.

    Raises:
        ValueError: If one is NaN or no whole number; names the first such row.
    """
    is_whole = np.isfinite(numbers) & (numbers == np.floor(numbers))
    wrong = np.flatnonzero(~is_whole | (np.abs(numbers) > MAX_LABEL))
    if len(wrong):
        row = int(wrong[0])
        more = f" ({len(wrong):,} such rows)" if len(wrong) > 1 else ""
        _whole(float(numbers[row]), f"split {split!r}, row {row}{more}")
    return numbers.astype(np.int64)


def as_label_array(labels: Any, num_rows: int, split: str) -> np.ndarray | None:
    """Turn what a data set states as its labels into an array.

    Args:
        labels: A list, array or tensor.
        num_rows: Number of rows.
        split: Name of the split, for messages.

    Returns:
        (N,) int64, -1 for None; or (N,) text as objects; or None where they are no such thing.

    Raises:
        ValueError: If a label is a float that is no whole number, or too large; names the row.
    """
    if labels is None or callable(labels):
        return None
    if isinstance(labels, (list, tuple)) and any(isinstance(item, str) for item in labels):
        whole_text = all(item is None or isinstance(item, str) for item in labels)
        return np.array(labels, dtype=object) if whole_text and len(labels) == num_rows else None
    if isinstance(labels, (list, tuple)):
        labels = [NO_LABEL if label is None else label for label in labels]
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.shape != (num_rows,):
        return None
    if array.dtype.kind in "UT":
        return array.astype(object)
    if array.dtype.kind == "f":
        return integral(array.astype(np.float64), split)
    if array.dtype.kind not in "biu":
        return None
    if num_rows:
        _in_range(int(array.max()), f"split {split!r}, row {int(array.argmax())}")
    return array.astype(np.int64)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
