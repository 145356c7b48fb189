"""Data sets known by name: where they are on the Hub and the augmentation that their papers use."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from kdtoolkit.data.augment import BatchAugment

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is known of a named data set before it is read.

    Attributes:
        hub_id: Its repository on the Hub; None for data that comes with a library.
        augment: Augmentation of training batches; None where images differ in size, so that each is
            cropped by itself.
        num_classes: Number of classes.
        size: (H, W) in pixels.
        eval_on_validation: Whether papers report accuracy on its validation split, as its test
            split has no labels.
    """

    hub_id: str | None
    augment: BatchAugment | None
    num_classes: int
    size: tuple[int, int]
    eval_on_validation: bool = False


PRESETS = {
    "cifar10": Preset("uoft-cs/cifar10", BatchAugment(padding=4), 10, (32, 32)),
    "cifar100": Preset("uoft-cs/cifar100", BatchAugment(padding=4), 100, (32, 32)),
    "tiny-imagenet": Preset("zh-plus/tiny-imagenet", BatchAugment(padding=8), 200, (64, 64), True),
    "fashion-mnist": Preset(
        "zalando-datasets/fashion_mnist", BatchAugment(padding=4), 10, (28, 28)
    ),
    "imagenet": Preset("ILSVRC/imagenet-1k", None, 1000, (224, 224), True),
    # no flip: a mirrored 2 is not a 2
    "digits": Preset(None, BatchAugment(padding=2, flip=0.0), 10, (16, 16)),
}
"""Presets by the name that `load` takes."""

DIGITS_TEST_ROWS = 500


@functools.cache
def load_digits() -> datasets.DatasetDict:
    """Make the data set "digits": handwritten digits of scikit-learn.

    1,797 images (UCI, Alpaydin & Kaynak 1998). Grey levels 0 .. 16 become 0 .. 255; 8x8 pixels
    become 16x16 by nearest neighbour (each pixel a 2x2 block).

    Returns:
        1,297 training and 500 test rows, the same for any seed.
    """
    import datasets
    import numpy as np
    import sklearn.datasets
    from PIL import Image

    from kdtoolkit.data.splits import draw_stratified

    raw = sklearn.datasets.load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    grey = grey.repeat(2, axis=1).repeat(2, axis=2)  # (N, 16, 16)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(d) for d in range(10)])
    )
    rows = {"image": [Image.fromarray(g) for g in grey], "label": raw.target.tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    train, test = draw_stratified(len(grey), DIGITS_TEST_ROWS, raw.target, seed=0)
    return datasets.DatasetDict(train=whole.select(train), test=whole.select(test))
