"""How batches are made: what is done to an image, where, and whether the split is held in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.cache import Cached, decode, fits
from kdtoolkit.data.columns import check_labels
from kdtoolkit.data.dataset import Split
from kdtoolkit.data.tables import HFTable, Table, TorchTable, sizes, to_tensor
from kdtoolkit.data.workers import (
    Counted,
    Numbered,
    Rows,
    Stream,
    ToBatch,
    Transform,
    eval_transform,
    rebuild,
    resize_transform,
    seeded,
    train_transform,
)

SMALL = 96  # pixels; up to here images of equal size are shifted and flipped, larger ones are cropped and resized
DEFAULT_SIZE = 224  # pixels
PROBE = 64  # images whose size is looked at before deciding
RawSplit = Table | Stream | DataLoader


@dataclasses.dataclass
class BatchingPlan:
    """What is done to an image.

    size       (H, W) of a batch
    augment    batched, on the device, for training
    for_train, for_eval   per sample; None: as decoded
    cache      decode into memory; `resize`: to `size`, else all must have it
    text       all this for people
    """

    size: tuple[int, int]
    augment: BatchAugment | None
    for_train: Transform | None
    for_eval: Transform | None
    cache: bool
    text: str
    resize: bool = False


def choose_batching(
    parts: Mapping[str, RawSplit],
    rows: Mapping[str, np.ndarray],
    spec: Any,
    preset: BatchAugment | None,
    size: tuple[int, int] | None,
    differ: bool = False,
) -> BatchingPlan:
    """Which transforms run where. `differ`: it is known that sizes differ."""
    train = parts["train"]
    if isinstance(spec, tuple):
        return _callables(train, *spec)
    if isinstance(train, DataLoader):
        return _loader(train, spec, size)
    others = [part for role, part in parts.items() if role in rows and part is not train]
    found = set().union(*(_sample(part) for part in [train, *others]))
    equal = next(iter(found)) if len(found) == 1 and not differ else None
    target = size or equal
    own = (
        spec is None and preset is None and _is_float(train)
    )  # the data set's own transforms made these floats
    if equal and target and (spec is not None or preset or own or max(target) <= SMALL):
        augment = (
            None
            if own
            else preset
            if spec is None and preset
            else _named(spec or "crop-flip", target)
        )
        step = resize_transform(target) if target != equal else None
        tables = {
            role: part for role, part in parts.items() if isinstance(part, HFTable | TorchTable)
        }
        cache = all(part.cacheable and not _is_float(part) for part in tables.values())
        cache = cache and bool(tables) and fits(sum(map(len, rows.values())), target)
        text = str(augment) if augment else _untouched(train) if own else "none"
        return BatchingPlan(target, augment, step, step, cache, text, resize=size is not None)
    target = size or (DEFAULT_SIZE, DEFAULT_SIZE)
    if spec is None and preset is None:
        text = f"RandomResizedCrop to {target[0]}x{target[1]} and flip, per sample; evaluation: Resize and CenterCrop"
        return BatchingPlan(
            target, None, train_transform(target), eval_transform(target), False, text
        )
    augment = preset if spec is None else _named(spec, target)
    text = f"Resize and CenterCrop to {target[0]}x{target[1]}, then {augment or 'none'}"
    return BatchingPlan(
        target, augment, eval_transform(target), eval_transform(target), False, text
    )


def _callables(train: RawSplit, for_train: Transform, for_eval: Transform) -> BatchingPlan:
    if isinstance(train, DataLoader):
        raise ValueError(
            "transforms has no effect on a DataLoader: put the callable into its data set"
        )
    with seeded(0):
        shape = to_tensor(for_train(_first(train)), "the output of transforms").shape
    text = f"the user's, per sample: {_short(for_train)}"
    return BatchingPlan((shape[1], shape[2]), None, for_train, for_eval, cache=False, text=text)


def _loader(train: DataLoader, spec: Any, size: tuple[int, int] | None) -> BatchingPlan:
    if size is not None:
        raise ValueError("image_size has no effect on a DataLoader: resize in its data set")
    found = next(iter(_sample(train)))
    augment = _named(spec, found)
    text = str(augment) if augment else "the user's DataLoader's own"
    return BatchingPlan(found, augment, None, None, cache=False, text=text)


def _named(spec: Any, size: tuple[int, int]) -> BatchAugment | None:
    """ "crop-flip" pads an eighth of the shorter side: 4 pixels at 32, 8 at 64."""
    if isinstance(spec, BatchAugment):
        return spec
    return BatchAugment(padding=max(1, min(size) // 8)) if spec == "crop-flip" else None


def _untouched(train: RawSplit) -> str:
    """What happens to float images; a TensorDataset has no transforms of its own."""
    bare = isinstance(train, TorchTable) and train.in_memory
    return "none (float images; transforms='crop-flip' adds one)" if bare else "the data set's own"


def _short(transform: Any) -> str:
    text = getattr(transform, "__qualname__", None) or " ".join(repr(transform).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _first(part: RawSplit) -> Any:
    """The first image, before any transform of ours."""
    if isinstance(part, Stream):
        first = next(part.raw(), None)
        if first is None:
            raise ValueError(f"split {part.split!r}: the stream holds no rows")
        return first[1]
    if isinstance(part, DataLoader):
        return _peek(part)["x"][0]
    return part.read(np.array([0]))[0][1]


def _peek(loader: DataLoader) -> dict[str, Any]:
    """One image of the user's loader as a batch of one, without starting its workers."""
    stream = isinstance(loader.dataset, IterableDataset)
    to_batch = ToBatch(loader.collate_fn, "train", 2**62, stream)
    fetched = (
        [next(iter(Counted(loader.dataset)))]
        if stream
        else Numbered(loader.dataset).__getitems__([0])
    )
    return to_batch(fetched)


def _is_float(part: RawSplit) -> bool:
    """True when the data set itself gives float tensors; they must be in [0, 1]."""
    with seeded(0):
        image = _first(part)
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return False
    to_tensor(image, "the first image")
    return True


def _sample(part: RawSplit) -> set[tuple[int, int]]:
    """The (H, W) of some images, spread over the split."""
    with seeded(0):
        if isinstance(part, (Stream, DataLoader)):
            shape = to_tensor(_first(part), "the first image").shape
            return {(shape[1], shape[2])}
        count = min(PROBE if part.cacheable else 8, len(part))
        return sizes(part, np.linspace(0, len(part) - 1, count).astype(int).tolist())


def build_split(
    parts: Mapping[str, RawSplit],
    rows: Mapping[str, np.ndarray],
    origin: Mapping[str, str],
    plan: BatchingPlan,
    count: int,
    seed: int,
    workers: int | None,
) -> dict[str, Split]:
    """Splits from parts. Raises SizesDiffer when decoding into memory meets an image of another size."""
    made: dict[str, Split] = {}
    for role, part in parts.items():
        train = role == "train"
        step = plan.for_train if train else plan.for_eval
        if isinstance(part, DataLoader):
            made[role] = _own(part, role, origin[role], count, workers if train else None)
        elif isinstance(part, Stream):
            if workers:
                raise ValueError(
                    f"num_workers={workers}: a stream is read in the main process; use 'auto' or 0"
                )
            part.transform, part.num_classes, part.seed = step, count, seed
            made[role] = Split(role, part, None, False, 0, origin[role])
        elif plan.cache:
            cached = decode(part, rows[role], plan.size, plan.resize)
            check_labels(cached.labels.numpy(), count, role, rows[role], unlabelled=train)
            made[role] = Split(role, cached, len(cached), True, workers or 0, origin[role])
        else:
            auto = 0 if part.in_memory else min(8, os.cpu_count() or 1)
            data = Rows(part, rows[role], step, count, seed, train)
            made[role] = Split(
                role, data, len(data), True, auto if workers is None else workers, origin[role]
            )
    return made


def _own(loader: DataLoader, role: str, origin: str, count: int, workers: int | None) -> Split:
    if workers is not None and workers != loader.num_workers:
        raise ValueError(
            f"num_workers={workers}, but the DataLoader has {loader.num_workers}: set it there"
        )
    new = rebuild(loader, role, count)
    if isinstance(new.dataset, Numbered):
        return Split(role, new.dataset, len(new.dataset), True, new.num_workers, origin, new)
    return Split(role, new.dataset, None, False, new.num_workers, origin, new)


def storage(made: Mapping[str, Split]) -> str:
    """How training data is held, for people."""
    data = made["train"].dataset
    if isinstance(data, Cached):
        held = sum(s.dataset.images.nbytes for s in made.values() if isinstance(s.dataset, Cached))
        return f"uint8 images in memory, {held / 2**20:.1f} MiB"
    if isinstance(data, Rows):
        return f"read row by row, {made['train'].num_workers} workers"
    return "streamed" if isinstance(data, Stream) else "the user's DataLoader"
