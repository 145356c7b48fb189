"""Checks of the options of `load`."""

from __future__ import annotations

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.transforms import ImageTransform
from kdtoolkit.utils.validation import check_whole_number, describe_value

MAX_IMAGE_SIZE = 65536  # pixels a side
TransformOption = str | BatchAugment | tuple[ImageTransform, ImageTransform | None] | None
"""None, `"none"`, `"crop-flip"`, a batched augmentation, or callables (for train, for eval); None
in place of the second is the default."""


def check_transforms(transforms: object) -> TransformOption:
    """Check the option `transforms`.

    Args:
        transforms: What the user gave.

    Returns:
        The option; one callable, which is for training alone, becomes a pair with None.

    Raises:
        ValueError: If it is none of the allowed kinds.
    """
    if transforms is None or isinstance(transforms, BatchAugment):
        return transforms
    if isinstance(transforms, str) and transforms in ("none", "crop-flip"):
        return transforms
    if isinstance(transforms, tuple) and len(transforms) == 2 and all(map(callable, transforms)):
        return transforms
    if callable(transforms):
        return transforms, None
    raise ValueError(
        f"transforms={transforms!r}: allowed are None, 'none', 'crop-flip', a BatchAugment, a "
        "callable on a PIL image (for train alone), or a tuple (for train, for eval) of callables"
    )


def check_image_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Check the option `image_size`.

    Args:
        size: Pixels of both sides, (H, W), or None.

    Returns:
        (H, W) in pixels, or None.

    Raises:
        ValueError: If it is neither.
    """
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not is_pair or not all(type(s) is int and 0 < s <= MAX_IMAGE_SIZE for s in sides):
        raise ValueError(
            f"image_size={describe_value(size)}: a number of pixels or (height, width), whole "
            f"numbers from 1 to {MAX_IMAGE_SIZE}"
        )
    return sides[0], sides[1]


def check_num_workers(num_workers: int | str) -> int | None:
    """Check the option `num_workers`.

    Args:
        num_workers: Number of processes from 0, or `"auto"`.

    Returns:
        The number; None for `"auto"`.

    Raises:
        ValueError: If it is neither.
    """
    if num_workers == "auto":
        return None
    check_whole_number("num_workers", num_workers, minimum=0, meaning="processes; or 'auto'")
    return int(num_workers)


def check_labelled(labelled: int | float | None) -> None:
    """Check the option `labelled`.

    Args:
        labelled: A number of rows from 1, a share above 0 and up to 1, or None.

    Raises:
        ValueError: If it is none of these.
    """
    if labelled is None:
        return
    is_count = isinstance(labelled, int) and not isinstance(labelled, bool) and labelled >= 1
    is_share = isinstance(labelled, float) and 0 < labelled <= 1
    if not is_count and not is_share:
        raise ValueError(
            f"labelled={labelled!r}: a number of rows from 1, or a share of them such as 0.1"
        )
