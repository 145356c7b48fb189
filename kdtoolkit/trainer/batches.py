"""Reading the training batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import skip_first_batches

from kdtoolkit.types import Clock

EMPTY_STREAM = "does not contain any data"  # accelerate's message for a stream without a batch


def remaining_batches(loader: Any, clock: Clock, epoch_start: int, end: int) -> Iterator[Any]:
    """Raw batches of an epoch that come after the current step.

    Args:
        loader: Training batches as `accelerate` prepared them.
        clock: Its step, which the caller advances, says how far the epoch is.
        epoch_start: Step at which the epoch began.
        end: Step at which the epoch is over.
    """
    if clock.step >= end:
        return
    done = clock.step - epoch_start
    try:
        for batch in skip_first_batches(loader, done) if done else loader:
            if clock.step >= end:
                return
            yield batch
    except ValueError as error:
        if EMPTY_STREAM not in str(error):
            raise
