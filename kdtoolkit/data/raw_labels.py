"""The labels of a split as its data has them, whole numbers or text, and their class ids."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import numpy as np

from kdtoolkit.data.label_values import NO_LABEL, sorted_names

MIN_ROWS_OF_IDS = 10  # from so many rows on, a value for every row is no class
MAX_NAMES = 5  # that a message lists


class RawLabels:
    """Labels of all rows, before they become class ids.

    Args:
        values: (N,) int64, -1 for a row without a label; or (N,) text as objects, None for such a
            row.
        split: Name of the split, for messages.

    Attributes:
        is_text: Whether they are text.
    """

    def __init__(self, values: np.ndarray, split: str) -> None:
        self.split, self.is_text = split, values.dtype == object
        self._values = values
        if self.is_text:
            self._has_label = np.array([value is not None for value in values], bool)
        else:
            self._has_label = values != NO_LABEL
        given = values[self._has_label]
        distinct, self._positions = np.unique(given, return_inverse=True)
        self._distinct: list[int | str] = distinct.tolist()

    @property
    def texts(self) -> tuple[str, ...]:
        """The different texts, in the order of their class ids."""
        return tuple(sorted_names([str(value) for value in self._distinct]))

    def check_repeats(self, what: str, is_sure: bool) -> None:
        """Check that labels repeat, as classes do and numbers of rows do not.

        Args:
            what: What the labels are, for the message.
            is_sure: Whether they are known to be labels by their name.

        Raises:
            ValueError: If every row has a label of its own; where they are not known to be labels,
                also if more than half of the rows have.
        """
        rows, distinct = len(self._positions), len(self._distinct)
        every = rows >= MIN_ROWS_OF_IDS and distinct == rows
        if every or (not is_sure and rows >= MIN_ROWS_OF_IDS and 2 * distinct > rows):
            raise ValueError(
                f"split {self.split!r}: {what} holds {distinct:,} different values in {rows:,} "
                "rows: that is a number or a text for each row, no class. Say which column is the "
                "label with columns=(None, label); if these are classes, make it a ClassLabel"
            )

    def codes(self, code_of: Mapping[int | str, int] | None = None) -> np.ndarray:
        """Return the class ids.

        Args:
            code_of: Label as the data has it -> class id; None: whole numbers as they are, texts by
                their place in `texts`.

        Returns:
            (N,) int64, -1 for a row without a label.

        Raises:
            ValueError: If a label is not in `code_of`; names the row.
        """
        if code_of is None:
            if not self.is_text:
                return self._values
            code_of = {name: code for code, name in enumerate(self.texts)}
        unknown = [at for at, value in enumerate(self._distinct) if value not in code_of]
        if unknown:
            first = int(np.flatnonzero(np.isin(self._positions, unknown))[0])
            row = int(np.flatnonzero(self._has_label)[first])
            value = self._distinct[int(self._positions[first])]
            raise unknown_label(value, code_of, f"split {self.split!r}, row {row}")
        ids = np.array([code_of[value] for value in self._distinct], np.int64)
        found = np.full(len(self._values), NO_LABEL, np.int64)
        if len(ids):
            found[self._has_label] = ids[self._positions]
        return found


def unknown_label(label: int | str, code_of: Mapping[int | str, int], where: str) -> ValueError:
    """Return the error for a label that is none of the training data's.

    Args:
        label: The label.
        code_of: Label -> class id.
        where: Start of the message.
    """
    known = list(code_of)
    shown = ", ".join(repr(name) for name in known[:MAX_NAMES])
    more = f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
    texts = {str(name).strip().lower(): name for name in known}
    close = difflib.get_close_matches(str(label).strip().lower(), texts, 1)
    hint = f" Did you mean {texts[close[0]]!r}?" if close and isinstance(label, str) else ""
    return ValueError(
        f"{where}: label {label!r} is none of the training data's ({shown}{more}).{hint} Correct "
        "or remove the row"
    )
