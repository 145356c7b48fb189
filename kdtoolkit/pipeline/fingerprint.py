"""Digests of data and weights: the same content has the same digest, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.seeding import seeded_generators

SAMPLE = (
    256  # rows of a split that are looked at, evenly spread; of data in memory all labels as well
)
FEW = 32  # the same, to compare the data of a resumed run
LENGTH = 16  # hexadecimal digits


def of_plain(value: Any) -> str:
    """Digest of plain values; addresses of objects are no content.

    Args:
        value: Numbers, text, lists and mappings; of other objects the text.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:LENGTH]


def of_network(net: nn.Module) -> str:
    """Digest of a network: structure, plain attributes and weights.

    Args:
        net: The network.

    Returns:
        16 hexadecimal digits.
    """
    found = hashlib.blake2b()
    for name, value in net.state_dict().items():
        found.update(name.encode())
        _add(found, value)
    structure = [(n, type(m).__qualname__, _plain_of(m)) for n, m in net.named_modules()]
    return of_plain([found.hexdigest(), structure, type(net).__qualname__])


IGNORED = (
    "training",
    "pretrained_cfg",
    "default_cfg",
    "num_classes",
    "kd_model_args",
    "grad_checkpointing",
)


def _plain_of(module: nn.Module) -> list[str]:
    """Attributes of a module beside its weights: numbers, words, functions."""
    described = []
    for key, value in sorted(vars(module).items()):
        if not key.startswith("_") and key not in IGNORED:
            if isinstance(value, (bool, int, float, str, tuple, list, torch.Size)):
                described.append(f"{key}={value!r}")
            elif callable(value):
                described.append(
                    f"{key}={getattr(value, '__qualname__', type(value).__qualname__)}"
                )
    return described


def of_data(data: Data) -> str:
    """Digest of what is trained and chosen on: sizes, augmentation, a sample of each split.

    Args:
        data: The data; its epoch is set to 0.

    Returns:
        16 hexadecimal digits.
    """
    described = {
        k: v
        for k, v in data.describe().items()
        if k not in ("name", "origin", "workers", "storage", "columns")
    }
    data.set_epoch(0)
    return of_plain(
        [
            described,
            data.class_names,
            [_of_split(s) for s in (data.train, data.val) if s is not None],
        ]
    )


def of_rows(data: Data) -> dict[str, str]:
    """Digests of the splits, to tell whether a run that is resumed has the data that it began with.

    A few rows are read twice. Of a stream, and of rows that are not the same when they are read
    again, nothing can be compared but their kind and number.

    Args:
        data: The data; its epoch is set to 0.

    Returns:
        Split -> 16 hexadecimal digits.
    """
    data.set_epoch(0)
    splits = [split for split in (data.train, data.val, data.test) if split is not None]
    return {split.name: _of_few_rows(split) for split in splits}


def _of_few_rows(split: Split) -> str:
    dataset = split.dataset
    kind = [type(getattr(dataset, "dataset", dataset)).__qualname__, split.num_rows]
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitems__"):
        return of_plain(kind)
    first, second = (_try_rows(split, FEW) for _ in range(2))
    labels = hashlib.blake2b()
    _add(labels, getattr(dataset, "labels", None))
    return of_plain([*kind, first if first == second else None, labels.hexdigest()])


def _try_rows(split: Split, count: int) -> str | None:
    """Digest of a few rows; None where one cannot be read, which training will tell."""
    try:
        found = hashlib.blake2b()
        with seeded_generators(0):
            at = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist()
            rows = split.dataset.__getitems__(at)  # type: ignore[attr-defined]
        for leaf in tree_leaves(rows):
            _add(found, leaf)
        return found.hexdigest()
    except Exception:
        return None


def of_weights_source(value: Any) -> Any:
    """What weights are loaded from, as plain values: the content where it can be read here.

    Args:
        value: A state dict, a path, or the name of weights elsewhere.

    Returns:
        A digest of a state dict or a file; other sources as text.
    """
    found = hashlib.blake2b()
    if isinstance(value, Mapping):
        for name, tensor in value.items():
            found.update(str(name).encode())
            _add(found, tensor)
        return found.hexdigest()[:LENGTH]
    path = os.path.expanduser(os.fspath(value))
    if not os.path.isfile(path):
        return os.fspath(value)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()[:LENGTH]


def _of_split(split: Split) -> str:
    found, dataset = hashlib.blake2b(), split.dataset
    with seeded_generators(0):  # a user's transforms may draw
        if isinstance(dataset, IterableDataset):
            rows: Any = next(iter(split.loader(SAMPLE)))
        else:
            at = np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(int).tolist()
            rows = dataset.__getitems__(at)  # type: ignore[attr-defined]
    for leaf in tree_leaves([rows, getattr(dataset, "labels", None)]):
        _add(found, leaf)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    """Tensors and images by content, numbers and words by text, other objects by class."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        found.update(repr(value).encode())
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    else:
        found.update(type(value).__qualname__.encode())
