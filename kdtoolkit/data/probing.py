"""A look at some images of a source, before it is decided what is done to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from kdtoolkit.data.image_reader import ImageOptions, ImageReader
from kdtoolkit.data.image_survey import ImageSurvey, check_not_plain
from kdtoolkit.data.open_splits import OpenSplits, SplitSource
from kdtoolkit.data.seeding import seeded_generators
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import HFTable, Row, TorchTable, read_image
from kdtoolkit.data.user_loader import first_images, spread_rows

PROBED_ROWS = 64  # images that are looked at
PROBED_ROWS_RANDOM = 8  # the same, where reading a row is not the same each time


def decide_reading(splits: OpenSplits, options: ImageOptions, user_transforms: bool) -> None:
    """Decide how images are read, for all splits together, from some of them.

    The decision becomes `splits.reader`, and the reader of every source.

    Args:
        splits: The splits, with their rows.
        options: What the user says of the images.
        user_transforms: Whether the user's transforms get the images of torch data sets as these
            give them.

    Raises:
        ValueError: If images are of a type, a shape or a range that is not known.
    """
    survey = ImageSurvey()
    looked_at: dict[str, SplitSource] = {}
    for name, source in splits.sources.items():
        is_new = not any(source is other for other in looked_at.values())
        if is_new and not (user_transforms and _is_torch(source)):
            looked_at[name] = source
    with seeded_generators(0):
        for name, source in looked_at.items():
            for where, image in _raw_images(source, name):
                survey.add(image, name, where)
            if name not in survey.shapes:
                raise ValueError(f"split {name!r} holds no rows with images; pass one that does")
    reader = splits.reader = survey.decide(options)
    splits.probed_sizes = survey.sizes(reader)
    for source in looked_at.values():
        if not isinstance(source, DataLoader):
            source.reader = reader
    if survey.transparent and options.channels != 4:
        _check_shape_is_seen(looked_at.get("train"), reader)


def _is_torch(source: SplitSource) -> bool:
    is_stream = isinstance(source, StreamDataset) and not source.is_hf
    return isinstance(source, TorchTable) or is_stream


def _raw_images(source: SplitSource, split: str) -> Iterator[tuple[str, Any]]:
    """Some images as the source gives them, with the place of each."""
    if isinstance(source, DataLoader):
        for batch in first_images(source, split, PROBED_ROWS_RANDOM):
            yield f"DataLoader of split {split!r}, the first images", batch[0]
        return
    for row in _raw_rows(source):
        yield f"split {split!r}, row {row.row}", row.image


def _raw_rows(source: HFTable | TorchTable | StreamDataset) -> Iterable[Row]:
    if isinstance(source, StreamDataset):
        return itertools.islice(source.read_raw(), PROBED_ROWS_RANDOM)
    count = PROBED_ROWS if source.is_cacheable else PROBED_ROWS_RANDOM
    return source.read_raw(spread_rows(len(source), count))


def _check_shape_is_seen(train: SplitSource | None, reader: ImageReader) -> None:
    """Refuse a background on which transparent images cannot be seen."""
    if train is None or isinstance(train, DataLoader):
        return
    rows = itertools.islice(_raw_rows(train), PROBED_ROWS_RANDOM)
    check_not_plain((read_image(reader, row, train.split).image for row in rows), reader)


def first_image(source: SplitSource) -> Any:
    """Read the first image, before any transform of ours.

    Args:
        source: What the rows of a split are read from; not a DataLoader.

    Returns:
        PIL image or (C, H, W) tensor as the reader makes it; as the data set gives it where there
        is no reader.

    Raises:
        ValueError: If the source holds no rows.
    """
    assert not isinstance(source, DataLoader)
    if isinstance(source, StreamDataset):
        first = next(source.read(), None)
        if first is None:
            raise ValueError(
                f"split {source.split!r}: the stream holds no rows; pass one that does"
            )
        return first.image
    return source.read(np.array([0]))[0].image


def gives_floats(source: SplitSource) -> bool:
    """Whether the data set itself gives float tensors.

    Args:
        source: What the rows of a split are read from.

    Returns:
        Whether the first image is one.

    Raises:
        ValueError: If its values are outside of [0, 1].
    """
    with seeded_generators(0):
        image = first_image(source)
    return isinstance(image, Tensor) and image.is_floating_point()


def find_common_size(splits: OpenSplits) -> tuple[int, int] | None:
    """Find the size that all images looked at have.

    Args:
        splits: The splits.

    Returns:
        (H, W) in pixels, or None where sizes differ.
    """
    tables = splits.tables()
    of_train = splits.probed_sizes["train"]
    others = [splits.probed_sizes.get(name, []) for name in tables if name != "train"]
    found = set(of_train).union(*others)
    return next(iter(found)) if len(found) == 1 else None
