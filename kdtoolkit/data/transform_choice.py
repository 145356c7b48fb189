"""What is done to an image, and where.

In memory, row by row in workers, or batched on the training device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.utils.data import DataLoader

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.cache import fits_in_memory
from kdtoolkit.data.images import to_tensor
from kdtoolkit.data.open_splits import OpenSplits, SplitSource
from kdtoolkit.data.options import TransformOption
from kdtoolkit.data.probing import find_common_size, first_image, gives_floats, probe_sizes
from kdtoolkit.data.seeding import seeded_generators
from kdtoolkit.data.tables import Table, TorchTable
from kdtoolkit.data.transforms import (
    ImageTransform,
    eval_transform,
    resize_transform,
    train_transform,
)

MAX_SMALL_SIDE = (
    96  # pixels; up to here images of equal size are shifted and flipped, larger ones are cropped
)
DEFAULT_SIDE = 224  # pixels
MAX_TEXT = 200  # characters of a transform's description


@dataclasses.dataclass
class TransformChoice:
    """What is done to an image.

    Attributes:
        size: (H, W) of a batch in pixels.
        augment: Batched augmentation of training batches on the device, or None.
        for_train: Transform of each training image; None: as decoded.
        for_eval: Transform of each other image; None: as decoded.
        cache: Whether images are decoded into memory.
        description: All this in words.
        resize: Whether the cache resizes images to `size`; otherwise all must have it.
    """

    size: tuple[int, int]
    augment: BatchAugment | None
    for_train: ImageTransform | None
    for_eval: ImageTransform | None
    cache: bool
    description: str
    resize: bool = False


def choose_transforms(
    splits: OpenSplits,
    option: TransformOption,
    preset: BatchAugment | None,
    image_size: tuple[int, int] | None,
    *,
    sizes_differ: bool = False,
) -> TransformChoice:
    """Choose which transforms run where.

    Args:
        splits: The splits, with their rows.
        option: From `check_transforms`.
        preset: Augmentation of a named data set, or None.
        image_size: (H, W) in pixels that the user gave, or None.
        sizes_differ: It is known that images differ in size.

    Returns:
        The plan.

    Raises:
        ValueError: If an option has no effect on a DataLoader, or images have a wrong form or
            range.
    """
    train = splits.train
    if isinstance(option, tuple):
        return _plan_user_transforms(train, *option)
    if isinstance(train, DataLoader):
        return _plan_user_loader(train, option, image_size)
    common_size = None if sizes_differ else find_common_size(splits)
    is_default = option is None and preset is None
    keeps_floats = is_default and gives_floats(train)  # the data set's own transforms made them
    if common_size is not None:
        size = image_size or common_size
        if keeps_floats:
            text = _describe_floats(train)
            return _plan_batched(splits, common_size, image_size, None, text)
        if not is_default or max(size) <= MAX_SMALL_SIDE:
            augment = _choose_augment(option, preset, size)
            return _plan_batched(splits, common_size, image_size, augment, str(augment or "none"))
    size = image_size or (DEFAULT_SIDE, DEFAULT_SIDE)
    for_eval = eval_transform(size)
    if is_default:
        text = (
            f"RandomResizedCrop to {size[0]}x{size[1]} and flip, per sample; "
            "evaluation: Resize and CenterCrop"
        )
        return TransformChoice(size, None, train_transform(size), for_eval, False, text)
    augment = preset if option is None else _augment_of(option, size)
    text = f"Resize and CenterCrop to {size[0]}x{size[1]}, then {augment or 'none'}"
    return TransformChoice(size, augment, for_eval, for_eval, False, text)


def _plan_batched(
    splits: OpenSplits,
    common_size: tuple[int, int],
    image_size: tuple[int, int] | None,
    augment: BatchAugment | None,
    description: str,
) -> TransformChoice:
    """Images of equal size: augmented in batches, and held in memory where they fit."""
    size = image_size or common_size
    transform = None if size == common_size else resize_transform(size)
    tables = splits.tables().values()
    num_rows = sum(len(rows) for rows in splits.rows.values())
    cache = bool(tables) and all(map(_is_cacheable, tables)) and fits_in_memory(num_rows, size)
    resize = image_size is not None
    return TransformChoice(size, augment, transform, transform, cache, description, resize)


def _is_cacheable(table: Table) -> bool:
    return table.is_cacheable and not gives_floats(table)


def _plan_user_transforms(
    train: SplitSource, for_train: ImageTransform, for_eval: ImageTransform
) -> TransformChoice:
    if isinstance(train, DataLoader):
        raise ValueError(
            "transforms has no effect on a DataLoader: put the callable into its data set"
        )
    with seeded_generators(0):
        image = to_tensor(for_train(first_image(train)), "the output of transforms")
    text = f"the user's, per sample: {_describe_transform(for_train)}"
    size = (image.shape[1], image.shape[2])
    return TransformChoice(size, None, for_train, for_eval, cache=False, description=text)


def _plan_user_loader(
    train: DataLoader[Any], option: str | BatchAugment | None, image_size: tuple[int, int] | None
) -> TransformChoice:
    if image_size is not None:
        raise ValueError("image_size has no effect on a DataLoader: resize in its data set")
    size = next(iter(probe_sizes(train)))
    augment = _augment_of(option, size)
    text = str(augment) if augment else "the user's DataLoader's own"
    return TransformChoice(size, augment, None, None, cache=False, description=text)


def _choose_augment(
    option: str | BatchAugment | None, preset: BatchAugment | None, size: tuple[int, int]
) -> BatchAugment | None:
    if option is None and preset is not None:
        return preset
    return _augment_of(option or "crop-flip", size)


def _augment_of(option: str | BatchAugment | None, size: tuple[int, int]) -> BatchAugment | None:
    """The augmentation of an option.

    "crop-flip" pads an eighth of the shorter side: 4 pixels at 32, 8 at 64.
    """
    if isinstance(option, BatchAugment):
        return option
    return BatchAugment(padding=max(1, min(size) // 8)) if option == "crop-flip" else None


def _describe_floats(train: SplitSource) -> str:
    """What happens to float images; a TensorDataset has no transforms of its own."""
    has_no_transforms = isinstance(train, TorchTable) and train.in_memory
    if has_no_transforms:
        return "none (float images; transforms='crop-flip' adds one)"
    return "the data set's own"


def _describe_transform(transform: ImageTransform) -> str:
    text = getattr(transform, "__qualname__", None) or " ".join(repr(transform).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
