"""Data sets known by name: where they live on the Hub and the augmentation their papers use."""

from __future__ import annotations

import dataclasses
import functools

import datasets
import numpy as np
from PIL import Image

from kdtoolkit.data.augment import BatchAugment
from kdtoolkit.data.splits import draw_stratified


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is known of a named data set before it is read.

    hub      the repository on the Hub, None for embedded data
    augment  what is done to training batches
    size     (H, W) in pixels
    """

    hub: str | None
    augment: BatchAugment
    num_classes: int
    size: tuple[int, int]


PRESETS = {
    "cifar10": Preset("uoft-cs/cifar10", BatchAugment(padding=4), 10, (32, 32)),
    "cifar100": Preset("uoft-cs/cifar100", BatchAugment(padding=4), 100, (32, 32)),
    "tiny-imagenet": Preset("zh-plus/tiny-imagenet", BatchAugment(padding=8), 200, (64, 64)),
    "fashion-mnist": Preset(
        "zalando-datasets/fashion_mnist", BatchAugment(padding=4), 10, (28, 28)
    ),
    "digits": Preset(
        None, BatchAugment(padding=2, flip=0.0), 10, (16, 16)
    ),  # a mirrored 2 is not a 2
}


@functools.cache
def digits() -> datasets.DatasetDict:
    """1,797 handwritten digits of scikit-learn (UCI, Alpaydin & Kaynak 1998): 1,297 train, 500 test, for any seed.

    Grey levels 0 .. 16 become 0 .. 255; 8x8 pixels become 16x16 by nearest neighbour (each pixel a 2x2 block).
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = (
        np.round(raw.images * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    )  # (N, 16, 16)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(d) for d in range(10)])
    )
    rows = {"image": [Image.fromarray(g) for g in grey], "label": raw.target.tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    train, test = draw_stratified(len(grey), 500, raw.target, seed=0)
    return datasets.DatasetDict(train=whole.select(train), test=whole.select(test))
