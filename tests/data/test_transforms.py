"""Which transform runs where, and how timm says the one of the evaluation."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from kdtoolkit import data
from kdtoolkit.data.timm_terms import in_timm_terms
from kdtoolkit.data.transforms import (
    EvalTransform,
    default_eval,
    resize_transform,
)

SIZES = [(40, 30), (30, 40), (64, 20), (33, 57), (24, 24)]  # (W, H)


def picture(seed, size=(32, 32), mode="RGB"):
    """A smooth picture with edges, so that every interpolation gives other pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.NEAREST).convert(mode)


def hf(sizes, num_rows=20):
    images = [picture(row, sizes[row % len(sizes)]) for row in range(num_rows)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=2))
    rows = {"image": images, "label": [row % 2 for row in range(num_rows)]}
    return datasets.Dataset.from_dict(rows, features=features)


class Pictures(Dataset):
    """A torch data set of PIL images."""

    def __init__(self, sizes, num_rows=20):
        self.sizes, self.num_rows = sizes, num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, row):
        return picture(row, self.sizes[row % len(self.sizes)]), row % 2


def floats(num_rows=20):
    torch.manual_seed(0)
    return TensorDataset(torch.rand(num_rows, 3, 20, 20), torch.arange(num_rows) % 2)


def black(image):
    """A transform of the user's that no evaluation should see."""
    return torch.zeros(3, 16, 16, dtype=torch.uint8)


SOURCES = {
    "equal sizes": lambda: hf([(32, 32)]),
    "equal sizes, large": lambda: hf([(120, 120)], 12),
    "several sizes": lambda: hf(SIZES),
    "torch, equal sizes": lambda: Pictures([(32, 32)]),
    "torch, several sizes": lambda: Pictures(SIZES),
    "torch, equal to the output": lambda: Pictures([(16, 16)]),
    "floats": floats,
}


def batch_of(split):
    return next(iter(split.loader(64)))["x"]


@pytest.mark.parametrize("source", SOURCES)
def test_one_callable_is_for_training_alone(source):
    make = SOURCES[source]
    given = {"validation": 0.2, "num_classes": 2, "num_workers": 0}
    used = data.load(make(), make(), transforms=black, **given)
    plain = data.load(make(), make(), image_size=16, **given)
    assert used.image_size == (16, 16) and not batch_of(used.train).any()
    for split in ("val", "test"):
        assert torch.equal(batch_of(getattr(used, split)), batch_of(getattr(plain, split)))
    assert used.augment is None and "black" in used.details["augmentation"]
    assert "black" not in used.details["evaluation"]
    pair = data.load(make(), make(), transforms=(black, black), **given)
    assert not batch_of(pair.test).any() and "black" in pair.details["evaluation"]


def test_one_callable_of_a_stream_is_for_training_alone():
    stream = {split: hf(SIZES).to_iterable_dataset() for split in ("train", "validation", "test")}
    used = data.load(stream, transforms=black, num_classes=2)
    assert not batch_of(used.train).any() and batch_of(used.test).float().std() > 10
    assert batch_of(used.val).shape[-2:] == (16, 16)


def test_an_image_size_that_a_callable_does_not_give_is_an_error():
    with pytest.raises(ValueError, match=r"image_size=\(20, 20\), but transforms gives images of"):
        data.load(hf(SIZES), transforms=black, image_size=20, num_workers=0)
    assert data.load(hf(SIZES), transforms=black, image_size=16, num_workers=0)


@pytest.mark.parametrize("side", [16, 24, 32, 50, 64, 96, 112, 128, 160, 192, 224, 256, 299, 384])
def test_the_evaluation_is_a_resize_to_256_224ths_and_a_crop(side):
    shorter = round(side * 256 / 224)
    image = picture(side, (side + 90, side + 31))
    wanted = v2.Compose([v2.Resize(shorter), v2.CenterCrop(side), v2.PILToTensor()])(image)
    assert torch.equal(default_eval((side, side)).build()(image), wanted)
    assert f"shorter side to {shorter} px" in str(default_eval((side, side)))


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (20, 20)])
def test_a_whole_resize_is_that_of_images_in_memory(size):
    image = picture(1, (33, 47))
    in_memory = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    wanted = v2.functional.pil_to_tensor(in_memory)
    as_tensor = v2.functional.pil_to_tensor(image)
    for given in (image, as_tensor, np.asarray(image)):
        assert torch.equal(resize_transform(size)(given), wanted)
    resized = resize_transform(size)(as_tensor / 255)
    assert resized.is_floating_point() and (resized - wanted / 255).abs().max() < 0.01


BICUBIC = v2.InterpolationMode.BICUBIC
KNOWN = {
    "as in ImageNet": v1.Compose([v1.Resize(28), v1.CenterCrop(24), v1.ToTensor()]),
    "v2": v2.Compose([v2.Resize([27]), v2.CenterCrop([24]), v2.ToImage()]),
    "bicubic": v2.Compose([v2.Resize(31, interpolation=BICUBIC), v2.CenterCrop(24)]),
    "lanczos": v1.Compose([v1.Resize(26, v1.InterpolationMode.LANCZOS), v1.CenterCrop(24)]),
    "number of PIL": v1.Compose([v1.Resize(26, 3), v1.CenterCrop(24), v1.PILToTensor()]),
    "both sides": v2.Compose([v2.Resize((24, 24)), v2.PILToTensor()]),
    "nested": v2.Compose([v2.Compose([v2.Resize(24)]), v2.Compose([v2.CenterCrop(24)])]),
}
UNKNOWN = {
    "a function": lambda image: image,
    "resized as a tensor": v2.Compose([v2.ToImage(), v2.Resize(28), v2.CenterCrop(24)]),
    "another step": v2.Compose([v2.Resize(28), v2.CenterCrop(24), v2.Grayscale(3)]),
    "crop first": v2.Compose([v2.CenterCrop(30), v2.Resize((24, 24))]),
    "padded": v2.Compose([v2.Resize(20), v2.CenterCrop(24)]),
    "longest side": v2.Compose([v2.Resize(28, max_size=60), v2.CenterCrop(24)]),
    "several shapes": v2.Compose([v2.Resize(24)]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_transforms_of_torchvision_are_said_in_timms_terms(name):
    transform = KNOWN[name]
    for seed, size in enumerate(SIZES):
        image = picture(seed, size)
        terms = in_timm_terms(transform, (24, 24), image)
        made = transform(image)
        if isinstance(made, Image.Image):
            made = v2.functional.pil_to_tensor(made)
        if made.is_floating_point():
            made = (made * 255).round().to(torch.uint8)
        assert terms.is_exact and torch.equal(terms.build()(image), made), str(terms)


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_transforms_are_said_to_have_no_terms(name):
    assert in_timm_terms(UNKNOWN[name], (24, 24), picture(0)) == EvalTransform(
        (24, 24), is_exact=False
    )


def test_a_data_set_with_a_transform_of_its_own_is_described_by_it():
    class Own(Pictures):
        transform = v1.Compose([v1.Resize(28), v1.CenterCrop(24), v1.ToTensor()])

        def __getitem__(self, row):
            image, label = super().__getitem__(row)
            return self.transform(image), label

    loaded = data.load(Own(SIZES), num_classes=2, num_workers=0)
    assert "Resize(size=28" in loaded.details["evaluation"]
    assert loaded.eval_terms == EvalTransform((24, 24), 24 / 28) and loaded.eval_terms.is_exact
