"""What a model returns: logits, alone or in an output object, a dict or a named tuple."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def take_logits(returned: object) -> object:
    """Take the logits out of what a model returned.

    Args:
        returned: A tensor, or anything with `logits`: an output object or a named tuple
            (attribute), a dict (key).

    Returns:
        The tensor under `logits`; what has none is returned as it is.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        logits = returned.get("logits")
    else:
        logits = getattr(returned, "logits", None)
    return logits if isinstance(logits, Tensor) else returned
