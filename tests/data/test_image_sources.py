"""Images of every source are read by the same rules; errors name the row, from workers too."""

from __future__ import annotations

import io
import traceback

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kdtoolkit import data as kd
from kdtoolkit.data.row_error import RowError

LEVELS = np.random.default_rng(0).integers(0, 256, (20, 8, 9, 3), np.uint8)
LEVELS[:, 0, 0], LEVELS[:, 0, 1] = 0, 255
LABELS = np.arange(20) % 2
EXPECTED = torch.from_numpy(LEVELS.transpose(0, 3, 1, 2).copy())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


class Images(Dataset):
    """A user's data set: items (image, label)."""

    def __init__(self, images, said=None):
        self.images, self.said = images, said

    def __len__(self):
        return self.said or len(self.images)

    def __getitem__(self, row):
        if row >= len(self.images):
            raise IndexError("list index out of range")
        return self.images[row], int(LABELS[row % 20])


class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter((image, int(LABELS[row])) for row, image in enumerate(self.images))


def load(source, **options):
    plain = {"validation": "none", "transforms": "none", "num_workers": 0, "num_classes": 2}
    return kd.load(source, source, **plain | options)


def pixels_of(data):
    """The test images (N, C, H, W) as levels 0 .. 255."""
    x = torch.cat([batch["x"] for batch in data.test.loader(8)])
    return x * 255.0 if x.is_floating_point() else x.float()


VALUES = {
    "uint8": LEVELS,
    "uint16, 12 bits": (LEVELS.astype(np.uint16) << 4) | (LEVELS >> 4),
    "int64": LEVELS.astype(np.int64),
    "float64 in [0, 1]": LEVELS / 255,
    "float32 in 0 .. 255": LEVELS.astype(np.float32),
    "float16 in [0, 1]": (LEVELS / 255).astype(np.float16),
}


@pytest.mark.parametrize("kind", ["array", "tensor", "TensorDataset", "DataLoader", "stream"])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("values", VALUES)
def test_one_rule_for_every_source(values, layout, kind):
    images = VALUES[values] if layout == "HWC" else VALUES[values].transpose(0, 3, 1, 2).copy()
    if kind != "array" and kind != "stream" and images.dtype == np.uint16:
        images = images.astype(np.int32)  # torch cannot stack every type of NumPy
    if kind == "array":
        source = Images(list(images))
    elif kind == "stream":
        source = Stream(list(images))
    else:
        tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(LABELS))
        source = {
            "tensor": Images(list(torch.from_numpy(images))),
            "TensorDataset": tensors,
            "DataLoader": DataLoader(tensors, 8),
        }[kind]
    data = load(source, transforms=None if kind == "DataLoader" else "none")
    assert data.image_size == (8, 9)
    assert (pixels_of(data) - EXPECTED).abs().max() <= 0.6
    said = data.describe()["images"]
    scaled = "12 bits" in values or "255" in values or "int64" in values
    assert ("scaled (decided from the first images)" in said) == scaled


FILES = {
    "12 bits in a 16-bit PNG": ("png", lambda p: Image.fromarray(p.astype(np.uint16) << 4), 15),
    "int32 TIFF": ("tiff", lambda p: Image.fromarray(p.astype(np.int32) * 257), 0),
    "float TIFF": ("tiff", lambda p: Image.fromarray((p / 255).astype(np.float32)), 0),
    "8-bit PNG": ("png", Image.fromarray, 0),
    "1-bit PNG": ("png", lambda p: Image.fromarray(p > 127), None),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_many_bits(case, tmp_path):
    suffix, make, tolerance = FILES[case]
    for row, pixels in enumerate(LEVELS[..., 0]):
        folder = tmp_path / "photos" / f"class{row % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        make(pixels).save(folder / f"{row:02}.{suffix}")
    data = kd.load(tmp_path / "photos", validation="none", transforms="none")
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    rows = data.train.dataset.index.tolist()
    grey = LEVELS[[order[row] for row in rows], ..., 0]
    expected = (grey > 127) * 255.0 if tolerance is None else grey
    found = data.train.dataset.images.numpy()
    assert np.abs(found - expected[:, None]).max() <= (tolerance or 0)
    assert found.min() == 0 and found.max() >= 240


def test_icons_whose_shape_is_in_alpha(tmp_path):
    for row in range(20):
        alpha = np.where(LEVELS[row, ..., 0] > 127, 255, 0).astype(np.uint8)
        folder = tmp_path / "icons" / f"class{row % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        black = np.zeros((8, 9, 3), np.uint8)
        Image.fromarray(np.dstack([black, alpha])).save(folder / f"{row:02}.png")
    data = kd.load(tmp_path / "icons", validation="none", transforms="none")
    images = data.train.dataset.images
    assert (
        len(images.unique(dim=0)) == len(images)
        and "alpha laid on white" in (data.describe()["images"])
    )
    with pytest.raises(ValueError, match="one plain colour once it is laid on the background"):
        kd.load(tmp_path / "icons", background="black")
    kept = kd.load(tmp_path / "icons", channels=4, validation="none", transforms="none")
    assert kept.channels == 4 and kept.train.dataset.images.shape[1] == 4
    grey = kd.load(tmp_path / "icons", channels=1, validation="none", transforms="none")
    assert grey.train.dataset.images.shape[1] == 1


@pytest.mark.parametrize("kind", ["rows", "DataLoader", "stream"])
def test_an_image_outside_of_the_range_names_its_row(kind):
    images = [np.asarray(image, np.float32) / 255 for image in LEVELS]
    images[11] = images[11] * 255  # not among those that are looked at first
    if kind == "rows":
        source = Images(images)
    elif kind == "stream":
        source = Stream(images)
    else:
        source = DataLoader(Images([torch.from_numpy(image) for image in images]), 4)
    data = load(source, transforms=None if kind == "DataLoader" else "none")
    with pytest.raises(RowError if kind == "rows" else ValueError, match="row 11.*0 to 255"):
        pixels_of(data)


@pytest.mark.parametrize("kind", ["rows", "DataLoader"])
@pytest.mark.parametrize("row", [10, 11])  # one of those that are looked at, and another
def test_a_unit_image_among_others_is_not_made_black(kind, row):
    images = [torch.from_numpy(image).float() for image in LEVELS]
    images[row] = images[row] / 255
    source = Images(images) if kind == "rows" else DataLoader(Images(images), 4)
    with pytest.raises(ValueError, match="the image is in .0, 1., other.* in 0 .. 255: scale all"):
        pixels_of(load(source, transforms=None if kind == "DataLoader" else "none"))
    known = load(source, transforms=None if kind == "DataLoader" else "none", pixel_range=(0, 255))
    assert pixels_of(known)[row].max() == 1


def test_images_of_two_layouts_are_told_apart():
    """(3, 9, 3) may be both: the others of the data set decide."""
    square = np.ascontiguousarray(LEVELS[:, :3])  # (3, 9, 3)
    wide = [image.transpose(2, 0, 1) for image in LEVELS[:5, :5]]  # (3, 5, 9): certain
    images = [*wide, *(image.transpose(2, 0, 1) for image in square[5:])]
    data = load(Images(images), image_size=9)
    assert data.image_size == (9, 9)
    first = data.test.dataset.table.read(np.array([6]))[0].image
    assert (np.asarray(first) == square[6]).all()


# --- rows that raise, lengths that lie


def raising(row):
    def get(self, found, plain=Images.__getitem__):
        if found == row:
            raise KeyError("no such file: 7.png")
        return plain(self, found)

    return type("Photos", (Images,), {"__getitem__": get})(list(LEVELS))


def error_of(data):
    """Text of the error of reading all images.

    An error that torch raises again for a worker keeps itself and the loader alive, and torch waits
    5 s for each worker when the garbage collector finds them.
    """
    try:
        pixels_of(data)
    except ValueError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)
    pytest.fail("no error")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_raises_is_named(workers):
    data = load(raising(11), num_workers=workers)
    text = error_of(data)
    assert text.startswith("split 'test', row 11: Photos raised KeyError: 'no such file: 7.png'")
    assert "test_image_sources.py, line" in text and "Traceback" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_of_a_loader_that_raises_is_named(workers):
    data = load(
        DataLoader(raising(11), 4, num_workers=workers), transforms=None, num_workers="auto"
    )
    text = error_of(data)
    assert "row 11" in text and "Photos raised KeyError" in text and "Traceback" not in text


def test_a_length_that_lies_is_said():
    with pytest.raises(ValueError, match="row 23: .*IndexError.*length is said to be 24"):
        load(Images(list(LEVELS), said=24))
    with pytest.raises(ValueError, match="row 23.*length is said to be 24: correct __len__"):
        load(DataLoader(Images(list(LEVELS), said=24), 4), transforms=None)


@pytest.mark.parametrize("length", [-1, 2.5, None])
def test_a_length_that_is_none_is_said(length):
    source = type("Photos", (Images,), {"__len__": lambda self: length})(list(LEVELS))
    with pytest.raises(ValueError, match="split 'train': len.. of Photos raised (Value|Type)Error"):
        load(source)


def test_a_stream_that_raises_names_the_row():
    def broken():
        yield from ((image, 0) for image in LEVELS[:10])
        raise OSError("the disk is gone")

    source = type("Broken", (IterableDataset,), {"__iter__": lambda self: broken()})()
    with pytest.raises(ValueError, match="split 'test', row 10: the stream raised OSError: the"):
        pixels_of(load(source))
    loader = DataLoader(source, 4, num_workers=0)
    with pytest.raises(ValueError, match="item 10: .*raised OSError: the disk is gone"):
        pixels_of(load(loader, transforms=None))


@pytest.mark.parametrize("workers", [0, 2])
def test_transforms_that_raise_name_the_row(workers):
    def fussy(image):
        if (np.asarray(image) == LEVELS[11]).all():
            raise TypeError("unexpected pixel")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    data = load(Images(list(LEVELS)), transforms=(fussy, fussy), num_workers=workers)
    text = error_of(data)
    assert text.startswith("split 'test', row 11: transforms raised TypeError: unexp")
    assert "Traceback" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_jpeg_is_a_sentence(workers):
    """200 rows of two sizes, so that workers read it, and no look at the first images does."""
    rows = []
    for row in range(200):
        file = io.BytesIO()
        Image.new("RGB", (40, 40 + row % 2), (row, 0, 0)).save(file, format="JPEG")
        content = file.getvalue()
        rows.append({"bytes": content[:-120] if row == 100 else content, "path": f"{row}.jpg"})
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])
    )
    labels = [row % 2 for row in range(200)]
    table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features)
    table = table.cast_column("image", datasets.Image())
    data = kd.load(table, table, validation="none", image_size=16, num_workers=workers)
    text = error_of(data)
    assert text.startswith("split 'test', row 100 (100.jpg): the image cannot be decoded: ")
    assert text.endswith("Replace or remove that row.") and "Traceback" not in text


def test_a_collate_function_that_raises_is_named():
    def collate(items):
        raise RuntimeError("stack expects each tensor to be equal size")

    with pytest.raises(ValueError, match="split 'train': collate_fn raised RuntimeError: stack"):
        load(DataLoader(Images(list(LEVELS)), 4, collate_fn=collate), transforms=None)


def test_user_transforms_get_the_images_as_they_are():
    seen = []

    def look(image):
        seen.append((type(image), image.dtype))
        return torch.zeros(3, 8, 9)

    load(Images([image.astype(np.uint16) * 257 for image in LEVELS]), transforms=(look, look))
    assert set(seen) == {(np.ndarray, np.dtype(np.uint16))}
