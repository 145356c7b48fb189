"""A look at some images of a source, before it is decided what is done to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from kdtoolkit.data.images import image_size, to_tensor
from kdtoolkit.data.open_splits import OpenSplits, SplitSource
from kdtoolkit.data.seeding import seeded_generators
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.user_loader import first_batch

PROBED_ROWS = 64  # images whose size is looked at
PROBED_ROWS_RANDOM = 8  # the same, where reading a row is not the same each time


def first_image(source: SplitSource) -> Any:
    """Read the first image, before any transform of ours.

    Args:
        source: What the rows of a split are read from.

    Returns:
        PIL image, array or (C, H, W) tensor.

    Raises:
        ValueError: If the source holds no rows.
    """
    if isinstance(source, StreamDataset):
        first = next(source.read(), None)
        if first is None:
            raise ValueError(
                f"split {source.split!r}: the stream holds no rows; pass one that does"
            )
        return first.image
    if isinstance(source, DataLoader):
        return first_batch(source)["x"][0]
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
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return False
    to_tensor(image, "the first image")
    return True


def find_common_size(splits: OpenSplits) -> tuple[int, int] | None:
    """Find the size that all images looked at have.

    Args:
        splits: The splits.

    Returns:
        (H, W) in pixels, or None where sizes differ.
    """
    train = splits.train
    tables = [table for table in splits.tables().values() if table is not train]
    found = set().union(*(probe_sizes(source) for source in [train, *tables]))
    return next(iter(found)) if len(found) == 1 else None


def probe_sizes(source: SplitSource) -> set[tuple[int, int]]:
    """Find the sizes of some images, spread over the split.

    Args:
        source: What the rows of the split are read from; of a stream or a DataLoader, only the
            first image is looked at.

    Returns:
        The different (H, W) in pixels.
    """
    with seeded_generators(0):
        if isinstance(source, (StreamDataset, DataLoader)):
            shape = to_tensor(first_image(source), "the first image").shape
            return {(shape[1], shape[2])}
        most = PROBED_ROWS if source.is_cacheable else PROBED_ROWS_RANDOM
        rows = np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)
        return {image_size(row.image) for row in source.read(rows)}
