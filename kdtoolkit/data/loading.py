"""Loading data: any source becomes a `Data` with training, validation and test splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.cache import CachedDataset, SizesDifferError
from kdtoolkit.data.class_ids import describe_empty_classes, settle_classes
from kdtoolkit.data.columns import ColumnNames, check_columns
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.image_options import Background, check_image_options
from kdtoolkit.data.open_splits import OpenSplits, check_table_labels, open_splits
from kdtoolkit.data.options import (
    TransformOption,
    check_image_size,
    check_labelled,
    check_num_workers,
    check_transforms,
)
from kdtoolkit.data.probing import decide_reading
from kdtoolkit.data.row_selection import hide_labels, select_rows
from kdtoolkit.data.rows import RowDataset
from kdtoolkit.data.sources import open_source
from kdtoolkit.data.split_builder import SplitBuilder, describe_storage
from kdtoolkit.data.splits import check_validation
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import HFTable
from kdtoolkit.data.transform_choice import TransformChoice, choose_transforms
from kdtoolkit.data.transforms import ImageTransform

if TYPE_CHECKING:
    import datasets
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    DataSource: TypeAlias = (
        str
        | os.PathLike[str]
        | datasets.Dataset
        | datasets.IterableDataset
        | Dataset[Any]
        | IterableDataset[Any]
        | DataLoader[Any]
        | Mapping[str, Any]
        | Data
    )


def load(
    train_data: DataSource,
    eval_data: DataSource | None = None,
    *,
    seed: int = 0,
    validation: str | int | float | None = "auto",
    transforms: str
    | BatchAugment
    | ImageTransform
    | tuple[ImageTransform, ImageTransform]
    | None = None,
    num_classes: int | None = None,
    num_workers: int | str = "auto",
    image_size: int | tuple[int, int] | None = None,
    data_path: str | os.PathLike[str] | None = None,
    train_limit: int | None = None,
    labelled: int | float | None = None,
    columns: ColumnNames | None = None,
    background: Background = None,
    channels: int = 3,
    pixel_range: tuple[float, float] | None = None,
) -> Data:
    """Open data of any kind, split it and choose how batches are made.

    Images become uint8, or floats in [0, 1]; nothing is normalised here. Training rows with the
    label -1, null or None are rows without a label: `Data.num_unlabelled` counts them, and rows for
    validation and test are drawn among the others. Draws by class give each class its share, and
    depend on the seed and the number of rows alone.

    Args:
        train_data: What to train on:

            - an HF `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`;
            - a torch `Dataset` whose items are (x, y) or a dict, or a `DataLoader`, which keeps its
              batch size, order and transforms;
            - the name of a preset (`PRESETS`, such as "cifar100" or "digits") or of a data set on
              the Hub;
            - a path to parquet files, to a data set written by `save_to_disk`, or to an image
              folder (train/CLASS/x.png or CLASS/x.png; names of classes that are all numbers are
              sorted as numbers; a folder that holds but one folder of folders is gone through);
            - a `Data`, which is returned as it is.
        eval_data: The same kinds; becomes the test split.
        seed: Seed of the draws for validation, `train_limit` and `labelled`, and of the
            augmentation.
        validation: Rows that choose the best epoch. "auto": the source's own validation split, else
            10 % of the training rows (at most 5,000), drawn by class; a share in (0, 1) or a number
            of training rows, drawn by class; "none", 0 or None; "test": choose on the test set.
        transforms: What is done to images. None: as the preset; else crop and flip in batches for
            images of equal size up to 96 pixels; else RandomResizedCrop and flip for each image.
            "none"; "crop-flip"; a `BatchAugment`; a callable that makes a (3, H, W) tensor of a PIL
            image, for training alone: images for evaluation get the default, at the same size; or
            two callables (for training, for evaluation).
        num_classes: Number of classes, where the data does not state it. Without it, whole numbers
            that are no class ids 0 .. C - 1, such as 1 .. 4, are numbered from 0 in their order.
        num_workers: Processes that read. "auto": 0 for data in memory, else the processors that
            this process may use, at most 8.
        image_size: Pixels of both sides, or (H, W), to which images are resized. None: as they are,
            or 224 where their sizes differ.
        data_path: Local copy of a named data set.
        train_limit: Train on this many rows only, drawn by class after the validation rows.
        labelled: Keep the labels of this many training rows (an int from 1), or of this share of
            them (a float in (0, 1]), drawn by class after all that; the labels of the others are
            hidden. None keeps all.
        columns: (image, label) columns of an HF data set; None for one that is to be found, the
            label by its name (label, class, target, ...), else by type. Text becomes classes.
        background: Colour that transparent images are laid on, as a name that PIL knows or (R, G,
            B). None: white; arrays and tensors of four channels are refused then, because their
            fourth need not be alpha.
        channels: Number of channels of the images that networks get: 3, 1 (grey) or 4 (alpha, or
            whatever the fourth is, is kept).
        pixel_range: Values of black and white of images that are not of 8 bits. None: decided for
            the whole data set from the first images: [0, 1] or 0 .. 255 for floats, the fewest of
            8, 10, 12, 14 and 16 bits that hold them for integers.

    Returns:
        The data. Where the source has no labelled test split, a validation split that `validation`
        does not use takes that place. Where it has neither, 20 % of the training rows do, drawn by
        class, the same for all seeds. Splits that are left out and classes without rows stand in
        `Data.notes`.

    Raises:
        ValueError: If the data or an option is of no known kind, options contradict each other,
            rows are too few, a label is outside of the classes, or an image cannot be decoded.
        FileNotFoundError: If a path does not exist.
        OSError: If a named data set cannot be fetched from the Hub.

    Example:
        >>> from kdtoolkit import data
        >>> digits = data.load("digits", validation=0.1, seed=0)
        >>> len(digits.train), len(digits.val), len(digits.test)
        (1167, 130, 500)
    """
    if isinstance(train_data, Data):
        return train_data
    validation = check_validation(validation)
    transform_option = check_transforms(transforms)
    size, workers = check_image_size(image_size), check_num_workers(num_workers)
    check_labelled(labelled)
    images = check_image_options(background, channels, pixel_range)
    columns = check_columns(columns)
    source = open_source(train_data, data_path)
    splits = open_splits(source, eval_data, columns)
    _check_columns_used(splits, columns)
    classes = settle_classes(splits.sources, num_classes)
    names, count = classes.names, classes.count
    is_val_the_test = source.preset is not None and source.preset.eval_on_validation
    select_rows(splits, validation, seed, train_limit, is_val_the_test)
    check_table_labels(splits, count)
    splits.notes += classes.notes
    splits.notes += describe_empty_classes(splits.tables(), splits.rows, classes)
    if labelled is not None:
        hide_labels(splits, labelled, seed)
    decide_reading(splits, images, user_transforms=isinstance(transform_option, tuple))
    preset = source.preset.augment if source.preset else None
    plan, built = _build(splits, transform_option, preset, size, count, seed, workers)
    if validation == "test":
        built["val"] = _test_as_validation(built)
    num_unlabelled = _num_unlabelled(built["train"])
    return Data(
        name=source.name,
        num_classes=count,
        class_names=list(names) if names else None,
        image_size=plan.size,
        train=built["train"],
        val=built.get("val"),
        test=built.get("test"),
        augment=plan.augment,
        seed=seed,
        details=_describe(splits, plan, built, seed, num_unlabelled),
        num_unlabelled=num_unlabelled,
        notes=splits.notes,
        channels=channels,
        eval_terms=plan.eval_terms,
    )


def _check_columns_used(splits: OpenSplits, columns: ColumnNames | None) -> None:
    train = splits.train
    has_columns = isinstance(train, HFTable) or (isinstance(train, StreamDataset) and train.is_hf)
    if columns is not None and not has_columns:
        raise ValueError(
            f"columns={columns!r} chooses columns of a Hugging Face data set without transforms of "
            "its own; this training data gives (image, label) itself: leave columns out"
        )


def _build(
    splits: OpenSplits,
    option: TransformOption,
    preset: BatchAugment | None,
    size: tuple[int, int] | None,
    num_classes: int,
    seed: int,
    num_workers: int | None,
) -> tuple[TransformChoice, dict[str, Split]]:
    """Plan and build the splits.

    If an image of another size is met while decoding, plan again for sizes that differ.
    """
    plan = choose_transforms(splits, option, preset, size)
    try:
        return plan, SplitBuilder(splits, plan, num_classes, seed, num_workers).build()
    except SizesDifferError as e:
        plan = choose_transforms(splits, option, preset, size, sizes_differ=True)
        plan.description += f" (sizes differ: {e})"
    return plan, SplitBuilder(splits, plan, num_classes, seed, num_workers).build()


def _test_as_validation(built: Mapping[str, Split]) -> Split:
    if "test" not in built:
        raise ValueError(
            "validation='test': there is no test split to choose on; pass eval_data or another "
            "validation"
        )
    return dataclasses.replace(
        built["test"], name="val", origin="the test set, as asked: validation='test'"
    )


def _num_unlabelled(train: Split) -> int:
    """Number of training rows without a label, where it is known before reading."""
    dataset = train.dataset
    return dataset.num_unlabelled() if isinstance(dataset, CachedDataset | RowDataset) else 0


def _describe(
    splits: OpenSplits,
    plan: TransformChoice,
    built: dict[str, Split],
    seed: int,
    num_unlabelled: int,
) -> dict[str, int | str]:
    """What was chosen and why, in words."""
    val, train = built.get("val"), splits.train
    details: dict[str, int | str] = {
        "seed": seed,
        "validation": val.origin if val is not None else f"none: {splits.no_validation}",
        "augmentation": plan.description,
        "evaluation": plan.evaluation,
        "images": splits.reader.description,
        "columns": getattr(train, "description", "batches of the user's DataLoader"),
        "storage": describe_storage(built),
    }
    if num_unlabelled:
        text = f"{num_unlabelled} of {len(built['train'])} training rows have no label"
        details["labels"] = f"{text}: {splits.hidden_labels}" if splits.hidden_labels else text
    return details
