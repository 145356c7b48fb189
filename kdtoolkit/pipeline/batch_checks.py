"""Check that BatchNorm can be trained on the smallest batch of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader

from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.data.dataset import Data
from kdtoolkit.pipeline.build import RunParts
from kdtoolkit.pipeline.networks import untapped


class SmallestBatch(NamedTuple):
    """The smallest batch of training images that a network gets.

    Attributes:
        size: Number of images.
        reason: Why it is so small, in words.
        advice: What makes it larger.
    """

    size: int
    reason: str
    advice: str


def check_smallest_batch(
    parts: RunParts, data: Data | None, config: TrainerConfig, ranks: int
) -> None:
    """Check that no BatchNorm gets a single value a channel.

    Args:
        parts: Networks and method, which are not changed.
        data: The data; None in a dry run of a known data set.
        config: Numbers of the training loop.
        ranks: Processes that share a batch.

    Raises:
        ValueError: If a batch has one image, and the map of one of the trained networks is a single
            pixel where it is normalised.
    """
    if data is None:
        return
    smallest = _smallest_batch(data.train.user_loader, config, ranks)
    if smallest.size != 1:
        return
    found = next(_single_values(parts, data.image_size), None)
    if found is not None:
        raise ValueError(
            f"{smallest.reason}, and {found} would get one value a channel, of which there is no "
            f"variance: {smallest.advice}"
        )


def _smallest_batch(
    loader: DataLoader[Any] | None, config: TrainerConfig, ranks: int
) -> SmallestBatch:
    parts = config.grad_accum * ranks
    shared = f" / ({parts} processes and accumulation steps)" if parts > 1 else ""
    whole = SmallestBatch(
        max(config.batch_size // parts, 1),
        f"a batch has one image (batch_size={config.batch_size}{shared})",
        "pass a larger batch_size",
    )
    batches = None if loader is None else loader.batch_sampler
    if ranks > 1 or type(batches) is not BatchSampler or batches.drop_last:
        return whole
    rows = len(batches.sampler)  # type: ignore[arg-type]
    left = rows % batches.batch_size
    if whole.size == 1 or left != 1:
        return whole
    return SmallestBatch(
        1,
        f"the last batch of the DataLoader has one image ({rows:,} rows in batches of "
        f"{batches.batch_size})",
        "build the DataLoader with drop_last=True, or with another batch_size",
    )


def _single_values(parts: RunParts, image_size: tuple[int, int]) -> Iterator[str]:
    """BatchNorms in training mode that get maps of one pixel, in words."""
    method, frozen = parts.method, parts.frozen_parts
    in_eval = {id(module) for module in frozen.modules} if frozen is not None else set()
    inside: set[int] = set()
    for name, net in method.networks().items():
        inside |= {id(module) for module in net.modules()}
        trace = untapped(net, image_size).trace
        norms = {n: m for n, m in net.named_modules() if isinstance(m, _BatchNorm)}
        for at, norm in norms.items():
            shapes = [out.shape for call in trace.calls.get(at, ()) for out in call.outputs]
            if id(norm) not in in_eval and any(_pixels(shape) == 1 for shape in shapes):
                yield f"{type(norm).__name__} {at!r} of the {name}"
    for at, module in method.named_modules():
        if isinstance(module, nn.BatchNorm1d) and id(module) not in inside:
            yield f"{type(module).__name__} {at!r} of the method"


def _pixels(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape[2:]:
        count *= side
    return count
