"""Which rows are trained on, which choose the model, which test it."""

from __future__ import annotations

import numpy as np

TRAIN = ("train", "training")
VAL = ("validation", "valid", "val", "dev")
TEST = ("test", "testing", "eval")
AUTO_SHARE, AUTO_ROWS, TEST_SHARE = (
    0.1,
    5000,
    0.2,
)  # validation: 10 % of train, at most 5,000 rows; test: 20 %


def draw_stratified(
    n: int, size: int, labels: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the positions 0 .. n - 1 into (rest, drawn), both sorted; `drawn` has `size`, each class in proportion.

    Shares are rounded by largest remainder. Without labels the draw is plain random.
    """
    generator = np.random.default_rng([seed & (2**64 - 1), n])
    order = generator.permutation(n)
    if labels is None:
        drawn = order[:size]
    else:
        classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        exact = counts * (size / n)
        take = np.floor(exact).astype(int)
        remainder = generator.permutation(len(classes))  # equal remainders: no class is preferred
        remainder = remainder[np.argsort(-(exact - take)[remainder], kind="stable")]
        take[remainder[: size - take.sum()]] += 1
        drawn = np.concatenate([order[inverse[order] == c][: take[c]] for c in range(len(classes))])
    kept = np.ones(n, bool)
    kept[drawn] = False
    return np.flatnonzero(kept), np.sort(drawn)


def check_validation(validation: object) -> str | int | float:
    """ "auto", "none", "test", a share in (0, 1) or a number of rows; 0 and None mean "none"."""
    if (
        validation is None
        or (validation == 0 and not isinstance(validation, bool))
        or validation == "none"
    ):
        return "none"
    if validation in ("auto", "test") and isinstance(validation, str):
        return validation
    if isinstance(validation, int) and not isinstance(validation, bool) and validation > 0:
        return validation
    if isinstance(validation, float) and 0 < validation < 1:
        return validation
    raise ValueError(
        f"validation={validation!r}: allowed are 'auto', a share of train such as 0.1, a number of rows, "
        "'test' (choose on the test set) and 'none'"
    )


def validation_rows(validation: str | int | float, n: int) -> int:
    """How many of n training rows are held out."""
    size = min(max(round(AUTO_SHARE * n), 1), AUTO_ROWS) if validation == "auto" else validation
    size = max(round(size * n), 1) if isinstance(size, float) else int(size)
    if size >= n:
        raise ValueError(
            f"validation={validation!r} holds out {size} of {n} training rows: leave some to train on"
        )
    return size
