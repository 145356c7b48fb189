"""What is done to an image, and where.

In memory, row by row in workers, or batched on the training device.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.cache import fits_in_memory
from kdtoolkit.data.images import image_size as size_of
from kdtoolkit.data.images import to_tensor
from kdtoolkit.data.open_splits import OpenSplits, SplitSource
from kdtoolkit.data.options import TransformOption
from kdtoolkit.data.probing import find_common_size, first_image, gives_floats
from kdtoolkit.data.row_error import raised_by_user
from kdtoolkit.data.seeding import seeded_generators
from kdtoolkit.data.tables import Table, TorchTable
from kdtoolkit.data.timm_terms import describe_transform, in_timm_terms, own_transform
from kdtoolkit.data.transforms import (
    EvalTransform,
    ImageTransform,
    default_eval,
    read_image,
    resize_transform,
    train_transform,
)

MAX_SMALL_SIDE = (
    96  # pixels; up to here images of equal size are shifted and flipped, larger ones are cropped
)
DEFAULT_SIDE = 224  # pixels
PIL_IMAGE = Image.new("RGB", (1, 1))  # what torchvision's data sets give their transforms
PROBED_RAW = 16  # images whose size is looked at where no reader has read them


@dataclasses.dataclass
class TransformChoice:
    """What is done to an image.

    Attributes:
        size: (H, W) of a batch in pixels.
        augment: Batched augmentation of training batches on the device, or None.
        for_train: Transform of each training image; None: as decoded.
        for_eval: Transform of each other image; None: as decoded.
        cache: Whether images are decoded into memory.
        description: What is done to training images, in words.
        evaluation: What is done to the others, in words.
        eval_terms: The same as timm's data configuration says it.
        resize: Whether the cache resizes images to `size`; otherwise all must have it.
    """

    size: tuple[int, int]
    augment: BatchAugment | None
    for_train: ImageTransform | None
    for_eval: ImageTransform | None
    cache: bool
    description: str
    evaluation: str
    eval_terms: EvalTransform
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
        if isinstance(train, DataLoader):
            raise ValueError(
                "transforms has no effect on a DataLoader: put the callable into its data set"
            )
        for_train, for_eval = option
        if for_eval is None:
            return _plan_training_transform(splits, for_train, preset, image_size)
        return _plan_user_transforms(splits, for_train, for_eval)
    if isinstance(train, DataLoader):
        return _plan_user_loader(option, image_size, splits)
    common_size = None if sizes_differ else find_common_size(splits)
    return _plan_own(splits, option, preset, image_size, common_size)


def _plan_own(
    splits: OpenSplits,
    option: str | BatchAugment | None,
    preset: BatchAugment | None,
    image_size: tuple[int, int] | None,
    common_size: tuple[int, int] | None,
) -> TransformChoice:
    """The transforms of this package."""
    is_default = option is None and preset is None
    if common_size is not None:
        size = image_size or common_size
        if is_default and gives_floats(splits.train):  # the data set's own transforms made them
            text = _describe_floats(splits.train)
            return _plan_batched(splits, common_size, image_size, None, text)
        if not is_default or max(size) <= MAX_SMALL_SIDE:
            augment = _choose_augment(option, preset, size)
            return _plan_batched(splits, common_size, image_size, augment, str(augment or "none"))
    size = image_size or (DEFAULT_SIDE, DEFAULT_SIDE)
    terms = default_eval(size)
    for_eval = terms.build()
    if is_default:
        text, for_train = _describe_crop(size), train_transform(size)
        return TransformChoice(size, None, for_train, for_eval, False, text, str(terms), terms)
    augment = preset if option is None else _augment_of(option, size)
    text = f"{terms}, then {augment or 'none'}"
    return TransformChoice(size, augment, for_eval, for_eval, False, text, str(terms), terms)


def _describe_crop(size: tuple[int, int]) -> str:
    return (
        f"RandomResizedCrop to {size[0]}x{size[1]} (scale 0.08 to 1, bilinear) and horizontal flip "
        "(p = 0.5), per sample"
    )


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
    evaluation, terms = _evaluation_of(splits, size, resize)
    if transform is not None:
        description = f"{terms}, then {description}"
    return TransformChoice(
        size, augment, transform, transform, cache, description, evaluation, terms, resize
    )


def _evaluation_of(
    splits: OpenSplits, size: tuple[int, int], resize: bool
) -> tuple[str, EvalTransform]:
    """What is done to images of equal size: nothing, or a resize of the whole image."""
    terms = EvalTransform(size, crop_mode="squash" if resize else "center")
    source = _evaluated_source(splits)
    own = own_transform(source.dataset) if isinstance(source, TorchTable) else None
    if own is None:
        return (str(terms) if resize else f"none, {size[0]}x{size[1]} as decoded"), terms
    made_by = f"the data set's own: {describe_transform(own)}"
    if resize:
        return f"{made_by}, then {terms}", dataclasses.replace(terms, is_exact=False)
    return made_by, in_timm_terms(own, size, PIL_IMAGE)


def _is_cacheable(table: Table) -> bool:
    return table.is_cacheable and not gives_floats(table)


def _plan_training_transform(
    splits: OpenSplits,
    for_train: ImageTransform,
    preset: BatchAugment | None,
    image_size: tuple[int, int] | None,
) -> TransformChoice:
    """The user's transform in training; evaluation as it is without one, at the same size."""
    _, size = _try_transform(splits, "train", for_train)
    if image_size not in (None, size):
        raise ValueError(
            f"image_size={image_size}, but transforms gives images of {size}: leave image_size "
            "out, or end the transforms with a resize to it"
        )
    own = _plan_own(splits, None, preset, size, _common_raw_size(splits))
    return dataclasses.replace(
        own, augment=None, for_train=for_train, cache=False, resize=False,
        description=_describe_users(for_train),
    )  # fmt: skip


def _plan_user_transforms(
    splits: OpenSplits, for_train: ImageTransform, for_eval: ImageTransform
) -> TransformChoice:
    _, size = _try_transform(splits, "train", for_train)
    evaluated = next((name for name in ("test", "val") if name in splits.sources), "train")
    image, eval_size = _try_transform(splits, evaluated, for_eval)
    return TransformChoice(
        size, None, for_train, for_eval, cache=False,
        description=_describe_users(for_train), evaluation=_describe_users(for_eval),
        eval_terms=in_timm_terms(for_eval, eval_size, image),
    )  # fmt: skip


def describe_unread(
    option: TransformOption, preset: BatchAugment | None, size: tuple[int, int], resize: bool
) -> tuple[str, str]:
    """Describe what is done to the images of a known data set that is not read.

    Args:
        option: From `check_transforms`.
        preset: The augmentation of the data set; None where its images differ in size.
        size: (H, W) in pixels.
        resize: Whether images are resized to it.

    Returns:
        What is done to training images, and to the others, in words.
    """
    terms = EvalTransform(size, crop_mode="squash")
    evaluation = str(terms) if resize else f"none, {size[0]}x{size[1]} as decoded"
    if preset is None and not isinstance(option, tuple):
        cropped = default_eval(size)
        augment = f"{cropped}, then {_augment_of(option, size) or 'none'}"
        return _describe_crop(size) if option is None else augment, str(cropped)
    if not isinstance(option, tuple):
        return str(_choose_augment(option, preset, size) or "none"), evaluation
    for_train, for_eval = option
    if for_eval is None:
        return _describe_users(for_train), "resize to the size that training images get"
    return _describe_users(for_train), _describe_users(for_eval)


def _describe_users(transform: ImageTransform) -> str:
    return f"the user's, per sample: {describe_transform(transform)}"


def _try_transform(
    splits: OpenSplits, split: str, transform: ImageTransform
) -> tuple[object, tuple[int, int]]:
    """The first image of a split, and the (H, W) in pixels that a transform gives it."""
    with seeded_generators(0):
        first = first_image(splits.sources[split])
        with raised_by_user(f"split {split!r}, row 0", "transforms"):
            made = transform(first)
        image = to_tensor(made, "the output of transforms", splits.reader.options)
    return first, (image.shape[1], image.shape[2])


def _common_raw_size(splits: OpenSplits) -> tuple[int, int] | None:
    """(H, W) that some images of all splits have before any transform; None where they differ."""
    found: set[tuple[int, int]] = set()
    with seeded_generators(0):
        for table in splits.tables().values():
            rows = np.linspace(0, len(table) - 1, min(PROBED_RAW, len(table))).astype(int)
            found |= {size_of(read_image(row.image)) for row in table.read(rows)}
    return next(iter(found)) if len(found) == 1 else None


def _evaluated_source(splits: OpenSplits) -> SplitSource:
    names = [name for name in ("test", "val", "train") if name in splits.sources]
    return splits.sources[names[0]]


def _plan_user_loader(
    option: str | BatchAugment | None, image_size: tuple[int, int] | None, splits: OpenSplits
) -> TransformChoice:
    if image_size is not None:
        raise ValueError("image_size has no effect on a DataLoader: resize in its data set")
    size = splits.probed_sizes["train"][0]
    augment = _augment_of(option, size)
    users = "the user's DataLoader's own"
    text = str(augment) if augment else users
    source = _evaluated_source(splits)
    own = own_transform(source.dataset) if isinstance(source, DataLoader) else None
    terms = in_timm_terms(own, size, PIL_IMAGE)
    evaluation = users if own is None else f"{users}: {describe_transform(own)}"
    return TransformChoice(size, augment, None, None, False, text, evaluation, terms)


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
