"""Images that fit in memory: decoded once into one uint8 tensor.

A batch is then one index into that tensor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdtoolkit.data.batch_order import split_repeats
from kdtoolkit.data.images import to_uint8
from kdtoolkit.data.tables import Table

MAX_CACHE_BYTES = 4 * 2**30
ROWS_PER_CALL = 256  # rows decoded by one call of a thread
MAX_THREADS = 8


class SizesDifferError(Exception):
    """An image is not of the size of the others, so that the split cannot be one tensor.

    Args:
        row: Number of the row.
        size: Its (H, W) in pixels.
        expected: The (H, W) of the others.
    """

    def __init__(self, row: int, size: tuple[int, ...], expected: tuple[int, int]) -> None:
        super().__init__(
            f"row {row} is {size[0]}x{size[1]}, others are {expected[0]}x{expected[1]}"
        )


class CachedDataset(Dataset[dict[str, Tensor]]):
    """Rows of one split in memory; an item or a batch is a dict of x, y and index, on the CPU.

    Args:
        images: (N, C, H, W) uint8.
        labels: Class ids, (N,) int64, -1 for a row without one.
        index: Numbers of the rows, (N,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        self.images, self.labels, self.index = images, labels, index

    def __len__(self) -> int:
        return len(self.index)

    def row_labels(self) -> np.ndarray:
        """Return the class ids, (N,) int64, -1 for a row without one."""
        return self.labels.numpy()

    def num_unlabelled(self) -> int:
        """Return how many rows have no label."""
        return int((self.labels < 0).sum())

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        at, draw = split_repeats(positions, len(self))
        return {"x": self.images[at], "y": self.labels[at], "index": self.index[at], **draw}

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {
            "x": self.images[position],
            "y": self.labels[position],
            "index": self.index[position],
        }


def fits_in_memory(num_rows: int, size: tuple[int, int]) -> bool:
    """Whether images fit in memory.

    They may take 4 GiB, and at most this rank's part of half the free memory.

    Args:
        num_rows: Number of images.
        size: (H, W) in pixels; an image takes 3 * H * W bytes.

    Returns:
        Whether they fit.
    """
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun: each rank has its own copy
    free = int(psutil.virtual_memory().available) // 2 // ranks
    return num_rows * 3 * size[0] * size[1] <= min(MAX_CACHE_BYTES, free)


def cache_rows(
    table: Table, rows: np.ndarray, size: tuple[int, int], resize: bool = False
) -> CachedDataset:
    """Decode rows of a table into memory.

    Args:
        table: The table.
        rows: Numbers of the rows, (N,) integers.
        size: (H, W) in pixels.
        resize: Resize images to `size`; otherwise all must have it.

    Returns:
        The rows in memory.

    Raises:
        SizesDifferError: At the first image that is not of `size`, unless `resize`.
    """
    channels = table.reader.options.channels if table.reader is not None else 3
    images = np.empty((len(rows), channels, *size), np.uint8)
    labels = np.empty(len(rows), np.int64)

    def decode_from(start: int) -> None:
        found = table.read(rows[start : start + ROWS_PER_CALL])
        for at, (row, image, label) in enumerate(found, start):
            pixels = to_uint8(image, size if resize else None)
            if pixels.shape[1:] != size:
                raise SizesDifferError(row, pixels.shape[1:], size)
            images[at], labels[at] = pixels, label

    threads = min(MAX_THREADS, os.cpu_count() or 1) if table.is_thread_safe else 1
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(decode_from, s) for s in range(0, len(rows), ROWS_PER_CALL)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return CachedDataset(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(rows))
