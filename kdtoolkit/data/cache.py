"""Images that fit in memory: decoded once into one uint8 tensor, so that a batch is one tensor index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdtoolkit.data.tables import SizesDiffer, Table, to_uint8

LIMIT = 4 * 2**30  # bytes
CHUNK = 256  # rows decoded by one call


def fits(rows: int, size: tuple[int, int]) -> bool:
    """True when rows * 3 * H * W bytes are at most 4 GiB and at most this rank's part of half the free memory."""
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )  # set by torchrun: each rank holds its own copy
    return rows * 3 * size[0] * size[1] <= min(
        LIMIT, psutil.virtual_memory().available // 2 // ranks
    )


class Cached(Dataset):
    """Rows of one split in memory. Items and batches are dict(x uint8 (B, 3, H, W), y (B,), index (B,)), on the CPU."""

    def __init__(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        self.images, self.labels, self.index = images, labels, index

    def __len__(self) -> int:
        return len(self.index)

    def row_labels(self) -> np.ndarray:
        """(N,) int64, -1 for a row without one."""
        return self.labels.numpy()

    def __getitems__(self, ids: Sequence[int]) -> dict[str, Tensor]:
        at, draw = apart(ids, len(self))
        return {"x": self.images[at], "y": self.labels[at], "index": self.index[at], **draw}

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.images[i], "y": self.labels[i], "index": self.index[i]}


def apart(ids: Sequence[int], rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions, of which i + k * rows is draw k of row i (see `sampling.Draws`) -> rows (B,) and {"draw": (B,)}; the
    latter is empty where all are first draws."""
    at = torch.as_tensor(ids, dtype=torch.int64)
    if not len(at) or int(at.max()) < rows:
        return at, {}
    return at % rows, {"draw": at // rows}


def decode(table: Table, rows: np.ndarray, size: tuple[int, int], resize: bool = False) -> Cached:
    """Decode `rows` of the table. Raises SizesDiffer at the first image that is not `size`, unless `resize`."""
    images = np.empty((len(rows), 3, *size), np.uint8)
    labels = np.empty(len(rows), np.int64)

    def chunk(start: int) -> None:
        items = table.read(rows[start : start + CHUNK])
        for at, (row, image, label) in enumerate(items, start):
            pixels = to_uint8(image, size if resize else None)
            if pixels.shape[1:] != size:
                raise SizesDiffer(row, pixels.shape[1:], size)
            images[at], labels[at] = pixels, label

    starts = range(0, len(rows), CHUNK)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if table.threads else 1) as pool:
        futures = [pool.submit(chunk, start) for start in starts]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Cached(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(rows))
