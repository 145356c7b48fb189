"""Whether a batch of images of the size that was asked for can be held in memory."""

from __future__ import annotations

import os

from kdtoolkit.pipeline.config import DistillConfig

COPIES = 3  # a batch as it is read, augmented and normalised


def check_batch_fits(config: DistillConfig) -> None:
    """Check that a batch of images fits in memory, before any image is read.

    Only what is certain is refused: the images alone must fit, features of networks need more.

    Args:
        config: The configuration; `image_size`, `channels`, `batch_size` and `grad_accum` are read.

    Raises:
        ValueError: If it cannot fit.
    """
    size = config.data.image_size
    if size is None:
        return
    height, width = (size, size) if isinstance(size, int) else size
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = max(1, config.trainer.batch_size // config.trainer.grad_accum // ranks)
    needed = COPIES * 4 * config.data.channels * height * width * rows
    free, where = _free_memory()
    if needed <= free:
        return
    raise ValueError(
        f"image_size={size!r}: a batch of {rows} images takes {needed / 2**30:.1f} GiB as it is "
        f"read, augmented and normalised, {free / 2**30:.1f} GiB of {where} are free: pass a "
        "smaller image_size or batch_size, or a larger grad_accum"
    )


def _free_memory() -> tuple[int, str]:
    """Free bytes of the device that trains, and its name."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]), "the GPU's memory"
    return int(psutil.virtual_memory().available), "memory"
