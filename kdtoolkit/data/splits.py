"""Drawing rows by class, and the option `validation`."""

from __future__ import annotations

import numpy as np

from kdtoolkit.data.seeding import MASK_64

AUTO_VALIDATION_SHARE = 0.1  # of the training rows
AUTO_VALIDATION_ROWS = 5000  # at most
TEST_SHARE = 0.2  # of the training rows, where there is no test split

Validation = str | int | float
"""`"auto"`, `"none"`, `"test"`, a share of the training rows or a number of rows."""


def draw_stratified(
    n: int, size: int, labels: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw some of n positions, each class in proportion.

    Shares are rounded by largest remainder; between equal remainders chance decides.

    Args:
        n: Number of positions.
        size: How many are drawn.
        labels: Class ids, (n,) integers; None: the draw is plain random.
        seed: Seed of the draw.

    Returns:
        The rest and those drawn, both sorted.
    """
    generator = np.random.default_rng([seed & MASK_64, n])
    order = generator.permutation(n)
    if labels is None:
        drawn = order[:size]
    else:
        classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        quota = _round_shares(counts * (size / n), size, generator)
        of_class = inverse[order]
        drawn = np.concatenate([order[of_class == c][: quota[c]] for c in range(len(classes))])
    is_rest = np.ones(n, bool)
    is_rest[drawn] = False
    return np.flatnonzero(is_rest), np.sort(drawn)


def _round_shares(exact: np.ndarray, total: int, generator: np.random.Generator) -> np.ndarray:
    """Round shares to whole numbers of the given sum, by largest remainder."""
    rounded: np.ndarray = np.floor(exact).astype(int)
    shuffled = generator.permutation(len(exact))  # equal remainders: no class is preferred
    remainders = (exact - rounded)[shuffled]
    by_remainder = shuffled[np.argsort(-remainders, kind="stable")]
    rounded[by_remainder[: total - rounded.sum()]] += 1
    return rounded


def check_validation(validation: object) -> Validation:
    """Check the option `validation`.

    Args:
        validation: What the user gave.

    Returns:
        `"auto"`, `"none"`, `"test"`, a share in (0, 1) or a number of rows; 0 and None become
        `"none"`.

    Raises:
        ValueError: If it is none of these.
    """
    if validation is None:
        return "none"
    if isinstance(validation, str) and validation in ("auto", "test", "none"):
        return validation
    if isinstance(validation, (int, float)) and not isinstance(validation, bool):
        if validation == 0:
            return "none"
        is_share = isinstance(validation, float) and 0 < validation < 1
        is_count = isinstance(validation, int) and validation > 0
        if is_share or is_count:
            return validation
    raise ValueError(
        f"validation={validation!r}: allowed are 'auto', a share of train such as 0.1, a number of "
        "rows, "
        "'test' (choose on the test set) and 'none'"
    )


def num_validation_rows(validation: Validation, num_rows: int) -> int:
    """How many training rows are held out for validation.

    Args:
        validation: `"auto"`, a share or a number of rows, from `check_validation`.
        num_rows: Number of training rows.

    Returns:
        Number of rows, at least 1.

    Raises:
        ValueError: If no row would be left to train on.
    """
    if validation == "auto":
        size = min(max(round(AUTO_VALIDATION_SHARE * num_rows), 1), AUTO_VALIDATION_ROWS)
    elif isinstance(validation, float):
        size = max(round(validation * num_rows), 1)
    else:
        size = int(validation)
    if size >= num_rows:
        raise ValueError(
            f"validation={validation!r} holds out {size} of {num_rows} training rows: leave some "
            "to train on"
        )
    return size
