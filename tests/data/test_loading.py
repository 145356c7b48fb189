"""kdtoolkit.data: sources, columns, splits, cache, workers, augmentation, errors; real images."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from kdtoolkit import data as kd
from kdtoolkit.data.augment import BatchAugment, crop_flip
from kdtoolkit.data.cache import CachedDataset
from kdtoolkit.data.options import check_transforms
from kdtoolkit.data.presets import load_digits
from kdtoolkit.data.rows import RowDataset
from kdtoolkit.data.seeding import derive_seed, hash_bits, hash_uniform, mix_bits, seeded_generators
from kdtoolkit.data.splits import draw_stratified
from kdtoolkit.data.transform_choice import describe_unread

SHARED = Path(os.environ.get("KDTOOLKIT_SHARED", Path(__file__).parents[2] / ".." / "shared"))
CIFAR = SHARED / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(
    not CIFAR.is_dir(), reason=f"no CIFAR-10 under {SHARED}: set KDTOOLKIT_SHARED"
)


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    """One thread (the machine may be shared), and HF's own cache in a folder that goes away."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small():
    """300 digits to train on and 100 to test, as an HF DatasetDict."""
    both = load_digits()
    return datasets.DatasetDict(
        train=both["train"].select(range(300)), test=both["test"].select(range(100))
    )


def tensors(split):
    """A split's images (N, 3, 16, 16) uint8 and labels (N,), decoded without kdtoolkit's cache."""
    x = np.stack([np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1) for row in split])
    return torch.from_numpy(x), torch.tensor(split["label"][:])


def batches(split, size=64, **options):
    return list(split.loader(size, **options))


def rows_of(split):
    return np.concatenate([b["index"].numpy() for b in batches(split)])


def batch_of(data, n=32):
    return next(iter(data.train.loader(n)))


# --- sources


def write_parquet(small, root):
    for name, split in small.items():
        split.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
    return root


def write_disk(small, root):
    small.save_to_disk(str(root / "saved"))
    return root / "saved"


def write_images(small, root, split_folders=True):
    for name, split in small.items():
        for i, row in enumerate(split):
            folder = root / "images" / (name if split_folders else "") / f"class{row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{name}{i}.png")
    return root / "images"


def as_torch(small, root):
    return TensorDataset(*tensors(small["train"])), TensorDataset(*tensors(small["test"]))


def as_loaders(small, root):
    train, test = as_torch(small, root)
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 64)


def as_stream(small, root):
    parts = {name: split.to_iterable_dataset() for name, split in small.items()}
    return datasets.IterableDatasetDict(parts)


SOURCES = {
    "DatasetDict": lambda small, root: small,
    "two Datasets": lambda small, root: (small["train"], small["test"]),
    "parquet folder": write_parquet,
    "saved data set": write_disk,
    "image folder": write_images,
    "torch Datasets": as_torch,
    "DataLoaders": as_loaders,
    "stream": as_stream,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_batches(kind, small, tmp_path):
    source = SOURCES[kind](small, tmp_path)
    train, test = source if isinstance(source, tuple) else (source, None)
    data = kd.load(train, test, validation="none", transforms="none")
    assert (data.num_classes, data.image_size, data.val) == (10, (16, 16), None)
    assert kd.load(data) is data
    got = batches(data.test)
    x, y, index = (torch.cat([b[k] for b in got]) for k in ("x", "y", "index"))
    want_x, want_y = tensors(small["test"])
    order = slice(None)
    if kind == "image folder":  # its order is that of the files' names
        order = sorted(range(100), key=lambda i: (int(want_y[i]), f"test{i}.png"))
    assert (
        x.dtype == torch.uint8 and torch.equal(x, want_x[order]) and torch.equal(y, want_y[order])
    )
    assert torch.equal(index, torch.arange(100))
    train = batches(data.train, shuffle=True)
    assert sum(len(b["y"]) for b in train) == 300 and sorted(
        torch.cat([b["index"] for b in train])
    ) == list(range(300))
    assert data.train.stable_index == (kind != "stream")
    assert data.train.num_rows == (None if kind == "stream" else 300) and bool(data.train)
    finished = data.prepare_batch(train[0], epoch=0, train=True)
    assert (
        finished["x"].dtype == torch.float32
        and finished["x"].min() >= 0
        and finished["x"].max() == 1
    )
    described = data.describe()
    assert (
        described["rows"] == {"train": data.train.num_rows, "test": data.test.num_rows}
        and described["augmentation"]
    )


def test_path_kinds_and_names(small, tmp_path):
    write_parquet(small, tmp_path)
    one = kd.load(
        tmp_path / "train-00000-of-00001.parquet", tmp_path / "test-00000-of-00001.parquet"
    )
    assert (len(one.train) + len(one.val), len(one.test)) == (300, 100)
    named = kd.load("digits", data_path=tmp_path)
    assert (
        named.name == "digits"
        and len(named.test) == 100
        and named.augment == BatchAugment(padding=2, flip=0.0)
    )
    flat = kd.load(
        str(write_images(small, tmp_path / "flat", split_folders=False))
    )  # class folders only: no test split
    assert len(flat.test) == 80 and "held out" in flat.describe()["origin"]["test"]
    assert flat.class_names == [f"class{k}" for k in range(10)]


def test_torch_datasets_of_many_kinds(small, tmp_path):
    folder = write_images(small, tmp_path)
    plain = kd.load(ImageFolder(folder / "train"), ImageFolder(folder / "test"))
    assert isinstance(plain.train.dataset, CachedDataset) and plain.class_names[3] == "class3"
    own = ImageFolder(folder / "train", transform=v2.Compose([v2.RandomCrop(12), v2.PILToTensor()]))
    data = kd.load(
        own,
        ImageFolder(folder / "test", v2.Compose([v2.CenterCrop(12), v2.PILToTensor()])),
        num_workers=0,
    )
    assert isinstance(data.train.dataset, RowDataset) and data.image_size == (12, 12)
    assert torch.equal(
        batch_of(data)["x"], batch_of(data)["x"]
    )  # seeded by (seed, epoch, row), also in there
    x, y = tensors(small["train"])
    floats = kd.load(TensorDataset(x / 255, y), num_workers=0)
    assert floats.augment is None and batch_of(floats)["x"].dtype == torch.float32
    assert floats.details["augmentation"].startswith("none (float images; transforms='crop-flip'")
    shifted = kd.load(TensorDataset(x / 255, y), num_workers=0, transforms="crop-flip")
    moved = shifted.augment(batch_of(shifted)["x"], torch.arange(32), seed=0, epoch=0)
    assert moved.dtype == torch.float32 and not torch.equal(moved, batch_of(shifted)["x"])
    inside = v2.Compose(
        [v2.RandomCrop(12), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    inside = kd.load(ImageFolder(folder / "train", inside), num_workers=0, validation="none")
    assert inside.details["augmentation"] == "the data set's own"
    subset = kd.load(Subset(TensorDataset(x, y), list(range(200))))
    assert len(subset.train) + len(subset.val) + len(subset.test) == 200
    transformed = small["train"].with_transform(
        lambda rows: {"x": [to_float(i) for i in rows["image"]], "y": rows["label"]}
    )
    assert batch_of(kd.load(transformed, num_workers=0))["x"].is_floating_point()
    pairs = DataLoader([(x[i], int(y[i])) for i in range(100)], 50)  # type: ignore[arg-type]
    assert kd.load(pairs, num_classes=10).test is None


def to_float(image):
    return v2.functional.to_dtype(
        v2.functional.pil_to_tensor(image.convert("RGB")), torch.float32, scale=True
    )


def test_user_loaders_keep_their_rows_and_batch_forms(small):
    x, y = tensors(small["train"])
    triple = DataLoader(TensorDataset(x, y, torch.arange(1000, 1300)), 32)
    assert batch_of(kd.load(triple))["index"][0] == 1000
    hf = small["train"].with_transform(
        lambda rows: {"pixel_values": [to_float(i) for i in rows["image"]], "label": rows["label"]}
    )
    loader = DataLoader(hf, 32, shuffle=True, drop_last=True)
    data = kd.load(loader, small["test"])
    assert (
        data.num_classes == 10
        and data.val is None
        and "cannot be held out" in data.describe()["validation"]
    )
    for batch in data.train.loader(7):
        assert len(batch["y"]) == 32
        assert torch.allclose(batch["x"], x[batch["index"]] / 255) and torch.equal(
            batch["y"], y[batch["index"]]
        )
    batch_sampler = torch.utils.data.BatchSampler(range(299, -1, -1), 50, False)
    custom = kd.load(DataLoader(TensorDataset(x, y), batch_sampler=batch_sampler))
    assert batches(custom.train)[0]["index"][0] == 299


# --- columns


def table(n=40, **columns):
    """n digits under the given extra columns: name -> (feature, values)."""
    part = load_digits()["train"].select(range(n)).remove_columns("label")
    for name, (feature, values) in columns.items():
        part = part.add_column(name, values, feature=feature)
    return part


FINE = datasets.ClassLabel(names=[f"fine{i}" for i in range(4)])
COARSE = datasets.ClassLabel(names=["a", "b"])
INT = datasets.Value("int64")


def test_columns_are_found_by_type():
    labels = [i % 4 for i in range(40)]
    both = table(zzz=(COARSE, [i % 2 for i in labels]), aaa=(FINE, labels))
    data = kd.load(both)
    assert data.num_classes == 4 and "not zzz" in data.describe()["columns"]
    assert kd.load(both, columns=(None, "zzz")).num_classes == 2
    integers = kd.load(table(cls=(INT, labels)))
    assert integers.num_classes == 4 and integers.class_names is None
    assert kd.load(table(cls=(INT, labels)), num_classes=6).num_classes == 6
    bare = table(cls=(INT, labels)).cast_column("image", datasets.Image(decode=False))
    bare = datasets.Dataset(
        bare.data.table.replace_schema_metadata(None)
    )  # as a parquet file that pandas wrote
    assert torch.equal(
        batch_of(kd.load(bare))["x"], batch_of(kd.load(table(cls=(INT, labels))))["x"]
    )


# --- splits


def test_digits_split_is_fixed_and_stratified():
    a, b = kd.load("digits", seed=1), kd.load("digits", seed=2)
    assert (len(a.train), len(a.val), len(a.test)) == (1167, 130, 500)
    assert torch.equal(a.test.dataset.images, b.test.dataset.images)
    assert not np.array_equal(rows_of(a.val), rows_of(b.val))
    counts = a.test.dataset.labels.bincount()
    assert counts.min() >= 48 and counts.max() <= 51
    raw = load_digits()["train"]
    for split in (a.train, a.val):  # held-out rows keep their numbers in train
        batch = next(iter(split.loader(8)))
        for x, index in zip(batch["x"], batch["index"], strict=True):
            assert np.array_equal(x[0], np.asarray(raw[int(index)]["image"]))
    assert a.augment.flip == 0
    assert (kd.PRESETS["digits"].num_classes, kd.PRESETS["digits"].size) == (
        a.num_classes,
        a.image_size,
    )


@pytest.mark.parametrize(
    ("validation", "sizes"),
    [
        ("auto", (270, 30)),
        (0.2, (240, 60)),
        (50, (250, 50)),
        (0, (300, None)),
        (None, (300, None)),
        ("test", (300, 100)),
    ],
)
def test_validation(small, validation, sizes):
    data = kd.load(small, validation=validation, seed=3)
    assert (len(data.train), data.val and len(data.val)) == sizes
    if validation == "test":
        assert data.val.name == "val" and "test set" in data.describe()["validation"]
    elif data.val:
        train, val = rows_of(data.train), rows_of(data.val)
        assert sorted([*train, *val]) == list(range(300))
        assert np.array_equal(val, rows_of(kd.load(small, validation=validation, seed=3).val))
        share = np.bincount(np.array(small["train"]["label"])) * sizes[1] / 300
        assert np.abs(data.val.dataset.labels.bincount().numpy() - share).max() < 1
        batch = next(iter(data.val.loader(8)))
        assert torch.equal(data.prepare_batch(batch, epoch=1, train=False)["x"], batch["x"] / 255)


def test_own_validation_split_and_missing_test(small):
    three = datasets.DatasetDict(
        train=small["train"], validation=small["test"].select(range(40)), test=small["test"]
    )
    data = kd.load(three)
    assert (len(data.train), len(data.val), len(data.test)) == (300, 40, 100)
    assert len(kd.load(three, validation=0.1).val) == 30
    two = kd.load(datasets.DatasetDict(train=small["train"], valid=small["test"]))
    assert len(two.train) == 300 and len(two.val) == 100 and two.test is None
    assert "there is no test split" in two.notes[0]
    one, other = kd.load(small["train"], seed=0), kd.load(small["train"], seed=1)
    assert len(one.test) == 60 and np.array_equal(rows_of(one.test), rows_of(other.test))
    assert not set(rows_of(one.test)) & {
        *rows_of(one.train),
        *rows_of(one.val),
        *rows_of(other.train),
    }
    hidden = small["test"].map(lambda row: {"label": -1})
    unlabelled = kd.load(
        datasets.DatasetDict(train=small["train"], validation=small["test"], test=hidden)
    )
    assert unlabelled.test is None and len(unlabelled.val) == 100
    assert "split 'test' (100 rows) is left out: its rows have no labels" in unlabelled.notes[0]


def test_train_limit_is_stratified_and_leaves_validation_alone(small):
    whole, part = kd.load(small), kd.load(small, train_limit=100)
    assert len(part.train) == 100 and np.array_equal(rows_of(whole.val), rows_of(part.val))
    assert (
        set(rows_of(part.train)) <= set(rows_of(whole.train))
        and part.train.dataset.labels.bincount().min() >= 8
    )


def test_draw_stratified_is_exact():
    labels = np.repeat(np.arange(7), [1, 2, 3, 50, 51, 52, 341])
    for size in (1, 7, 50, 499):
        rest, drawn = draw_stratified(500, size, labels, seed=size)
        assert len(drawn) == size and sorted([*rest, *drawn]) == list(range(500))
        share = np.bincount(labels) * size / 500
        assert np.abs(np.bincount(labels[drawn], minlength=7) - share).max() < 1


# --- the hash and the augmentation


def test_hash_is_uniform_and_independent():
    index = torch.arange(100_000)
    u = hash_uniform(0, 0, index, 0)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    draws = [
        u,
        hash_uniform(1, 0, index, 0),
        hash_uniform(0, 1, index, 0),
        hash_uniform(0, 0, index, 1),
        u.roll(1),
    ]
    for draw in draws:
        counts = torch.histc(draw, 100, 0, 1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi2, 99 degrees of freedom: p > 1e-4
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(5)
    assert correlation.abs().max() < 0.015  # 4.7 standard deviations
    assert hash_bits(0, 0, index, [0]).unique().numel() > 99_000
    big = hash_uniform(2**70 + 1, 0, torch.tensor([0, 2**32, 2**40]), 0)
    assert (
        big.unique().numel() == 3
        and derive_seed(1) != derive_seed(1 + 2**32)
        and derive_seed(-1) != derive_seed(1)
    )
    assert mix_bits(0xFFFFFFFF) == int(
        mix_bits(torch.tensor([0xFFFFFFFF]))
    )  # Python integers and tensors agree


def test_offsets_and_flips_are_uniform():
    augment = BatchAugment(padding=4)
    n = 81_000
    dy, dx, flip = augment.draw(torch.arange(n), seed=0, epoch=3)
    counts = torch.bincount(dy * 9 + dx, minlength=81)
    assert (
        len(counts) == 81 and ((counts - 1000.0) ** 2 / 1000).sum() < 135
    )  # chi2, 80 degrees of freedom
    assert abs(flip.float().mean() - 0.5) < 4.5 * 0.5 / n**0.5
    for place in range(81):  # flips do not depend on the offset
        assert abs(flip[dy * 9 + dx == place].float().mean() - 0.5) < 0.08
    assert not BatchAugment(flip=0.0).draw(torch.arange(1000), seed=0, epoch=0)[2].any()
    assert BatchAugment(flip=1.0).draw(torch.arange(1000), seed=0, epoch=0)[2].all()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("shape", [(16, 16), (12, 16)])
def test_crop_flip_equals_a_slow_loop(mode, shape):
    x = tensors(load_digits()["test"].select(range(60)))[0][:, :, : shape[0]]
    dy, dx, flip = BatchAugment(padding=3).draw(torch.arange(60), seed=1, epoch=1)
    got = crop_flip(x, dy, dx, flip, 3, mode)
    for i in range(60):
        pads = ((0, 0), (3, 3), (3, 3))
        padded = np.pad(x[i].numpy(), pads, "constant" if mode == "zeros" else "reflect")
        want = padded[:, dy[i] : dy[i] + shape[0], dx[i] : dx[i] + shape[1]]
        assert np.array_equal(got[i], want[:, :, ::-1] if flip[i] else want)
    assert torch.equal(
        crop_flip(x / 255, dy, dx, flip, 3, mode), got / 255
    )  # before or after the turn to float


def test_augmentation_depends_on_seed_epoch_and_index_alone(small):
    data = kd.load(small, transforms=BatchAugment(padding=3), seed=5)

    def epoch(number, **options):
        images = {}
        for batch in data.train.loader(**options):
            out = data.prepare_batch(batch, epoch=number, train=True)
            images.update(zip(out["index"].tolist(), out["x"], strict=True))
        return images

    first = epoch(1, batch_size=64)
    for again in (epoch(1, batch_size=17, shuffle=True), epoch(1, batch_size=1)):
        assert first.keys() == again.keys() and all(torch.equal(first[i], again[i]) for i in first)
    other = epoch(2, batch_size=64)
    assert np.mean([torch.equal(first[i], other[i]) for i in first]) < 0.1


def test_views(small):
    data = kd.load(small, transforms="crop-flip")
    batch = batch_of(data)
    out = data.prepare_batch(batch, epoch=0, train=True, views=3)
    assert out["views"].shape == (32, 3, 3, 16, 16) and torch.equal(out["views"][:, 0], out["x"])
    assert torch.equal(out["x"], data.prepare_batch(batch, epoch=0, train=True)["x"])
    assert not torch.equal(out["views"][:, 1], out["views"][:, 2])
    assert "views" not in data.prepare_batch(batch, epoch=0, train=False, views=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_bits(small):
    data = kd.load(small, transforms="crop-flip")
    batch = batch_of(data)
    there = data.prepare_batch({k: v.cuda() for k, v in batch.items()}, epoch=1, train=True)
    assert torch.equal(there["x"].cpu(), data.prepare_batch(batch, epoch=1, train=True)["x"])
    assert torch.equal(
        hash_uniform(1, 2, batch["index"].cuda(), 3).cpu(), hash_uniform(1, 2, batch["index"], 3)
    )


# --- per sample: the user's transforms, other sizes, streams


def test_user_transforms_are_seeded_per_sample_and_leave_no_trace(small):
    def noisy(image):
        x = to_float(image) * random.uniform(0.5, 1) * float(np.random.uniform(0.5, 1))
        return v2.functional.resize(x, [20, 20]).clamp(0, 1) * torch.rand(())

    data = kd.load(
        small, transforms=(noisy, v2.Compose([v2.Resize(20), v2.PILToTensor()])), num_workers=0
    )
    assert data.image_size == (20, 20) and isinstance(data.train.dataset, RowDataset)
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    data.set_epoch(1)
    first = {
        int(i): x for b in data.train.loader(32) for i, x in zip(b["index"], b["x"], strict=True)
    }
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    torch.manual_seed(0)
    next(iter(DataLoader(range(3))))  # a loader draws one seed for its workers, with any data
    assert (
        torch.equal(state[0], torch.get_rng_state())
        and before[1] == state[1]
        and (before[2] == state[2]).all()
    )
    workers = DataLoader(
        data.train.dataset, 9, shuffle=True, num_workers=2, collate_fn=lambda batch: batch
    )
    for b in workers:
        assert all(torch.equal(first[int(i)], x) for i, x in zip(b["index"], b["x"], strict=True))
    data.set_epoch(2)
    assert not torch.equal(first[int(rows_of(data.train)[0])], batch_of(data)["x"][0])
    out = data.prepare_batch(batch_of(data), epoch=2, train=True)
    assert (
        torch.equal(out["x"], batch_of(data)["x"])
        and next(iter(data.test.loader(4)))["x"].dtype == torch.uint8
    )


def odd_sizes(n=20):
    """Digits of two widths."""
    images = [
        row["image"].resize((20 + 4 * (i % 2), 20))
        for i, row in enumerate(load_digits()["train"].select(range(n)))
    ]
    rows = {"image": images, "label": [i % 2 for i in range(n)]}
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=COARSE))


def test_different_sizes_are_read_row_by_row():
    data = kd.load(odd_sizes(), image_size=16, num_workers=0)
    assert (
        isinstance(data.train.dataset, RowDataset)
        and "RandomResizedCrop" in data.describe()["augmentation"]
    )
    assert (
        batch_of(data)["x"].shape[1:]
        == (3, 16, 16)
        == next(iter(data.test.loader(4)))["x"].shape[1:]
    )
    assert kd.load(odd_sizes(), num_workers=0).image_size == (224, 224)
    shifted = kd.load(odd_sizes(), transforms="crop-flip", image_size=(16, 24), num_workers=0)
    assert batch_of(shifted)["x"].dtype == torch.uint8 and shifted.augment == BatchAugment(
        padding=2
    )


def test_one_image_of_another_size_is_noticed_while_decoding(small):
    images = list(small["train"]["image"]) * 2
    images[301] = images[301].resize((18, 18))  # not among those looked at first
    rows = {"image": images, "label": list(small["train"]["label"]) * 2}
    data = kd.load(
        datasets.Dataset.from_dict(rows, small["train"].features), num_workers=0, image_size=None
    )
    assert (
        isinstance(data.train.dataset, RowDataset)
        and "row 301 is 18x18" in data.describe()["augmentation"]
    )
    resized = kd.load(datasets.Dataset.from_dict(rows, small["train"].features), image_size=16)
    assert isinstance(resized.train.dataset, CachedDataset)


def test_too_large_for_memory_keeps_the_batched_augmentation(small, monkeypatch):
    cached = kd.load(small)
    monkeypatch.setattr("kdtoolkit.data.cache.MAX_CACHE_BYTES", 1000)
    data = kd.load(small, num_workers=0)
    assert isinstance(data.train.dataset, RowDataset) and data.augment == cached.augment
    assert torch.equal(batch_of(data)["x"], batch_of(cached)["x"])
    assert kd.load(small).train.num_workers == min(8, os.cpu_count() or 1)


def test_streams_shuffle_by_epoch(small):
    data = kd.load(as_stream(small, None), num_workers=0)
    assert (
        data.val is None and data.test.num_rows is None and data.augment == BatchAugment(padding=2)
    )
    loader = data.train.loader(300, shuffle=True)
    orders = []
    for epoch in (0, 0, 1):
        data.set_epoch(epoch)
        orders.append(next(iter(loader))["y"])
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    plain = next(iter(data.train.loader(300)))["y"]
    assert plain.tolist() == small["train"]["label"][:] and not torch.equal(plain, orders[0])
    only = kd.load(small["train"].to_iterable_dataset())
    assert only.test is None


def test_modes_and_resizing(small):
    whole = np.arange(64 * 48).reshape(64, 48) % 256
    features = datasets.Features(image=datasets.Image(), label=COARSE)
    modes = [
        Image.fromarray(whole.astype(np.uint8)).convert(m)
        for m in ("L", "RGB", "P", "RGBA", "1", "CMYK")
    ]
    modes += [Image.fromarray((whole * 256).astype(np.uint16))] * 4
    part = datasets.Dataset.from_dict({"image": modes, "label": [0, 1] * 5}, features)
    data = kd.load(part, image_size=(32, 24), validation="none")
    assert data.image_size == (32, 24) and data.train.dataset.images.shape == (8, 3, 32, 24)
    grey, deep = kd.load(part.select([0] * 5)), kd.load(part.select([6] * 5))
    assert torch.equal(grey.train.dataset.images, deep.train.dataset.images)


# --- with accelerate


def test_prepared_loader_splits_batches_and_shuffles_by_epoch(small):
    config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    data = kd.load(small)
    loader = accelerator.prepare(data.train.loader(64, shuffle=True, drop_last=True))
    orders = []
    for epoch in (0, 1, 1):
        data.set_epoch(epoch)
        loader.set_epoch(epoch)
        got = list(loader)
        assert [len(b["y"]) for b in got] == [64] * 4
        orders.append(torch.cat([b["index"] for b in got]))
    assert not torch.equal(orders[0], orders[1]) and torch.equal(orders[1], orders[2])
    loader.set_epoch(1)
    skipped = accelerator.skip_first_batches(loader, 2)
    assert torch.equal(torch.cat([b["index"] for b in skipped]), orders[2][128:])
    stream = accelerator.prepare(kd.load(as_stream(small, None)).train.loader(64))
    assert [len(b["y"]) for b in stream] == [64, 64, 64, 64, 44]
    own = accelerator.prepare(kd.load(as_loaders(small, None)[0]).train.loader(64))
    assert sorted(torch.cat([b["index"] for b in own]).tolist()) == list(range(300))


# --- real CIFAR-10


@needs_cifar
def test_cifar10():
    data = kd.load("cifar10", data_path=CIFAR, train_limit=1000, validation=500)
    assert (
        data.num_classes == 10 and data.class_names[0] == "airplane" and data.image_size == (32, 32)
    )
    assert (len(data.train), len(data.val), len(data.test)) == (1000, 500, 10_000)
    assert data.augment == kd.PRESETS["cifar10"].augment == BatchAugment(padding=4)
    assert set(data.test.dataset.labels.bincount().tolist()) == {1000}
    assert set(data.train.dataset.labels.bincount().tolist()) == {100}
    mean = data.test.dataset.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(
        mean, torch.tensor([0.4942, 0.4851, 0.4504], dtype=torch.float64), atol=1e-4
    )
    assert [round(x, 2) for x in mean.tolist()] == [0.49, 0.49, 0.45]


def test_imagenet_crops_images_and_reports_its_validation_split(tmp_path):
    def split(rows, labels):
        images = [Image.new("RGB", (40 + 9 * k, 60), (k, 9, 9)) for k in range(rows)]
        kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=3))
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)

    made = {"train": split(6, [0, 1, 2] * 2), "validation": split(3, [0, 1, 2])}
    made["test"] = split(2, [-1, -1])  # as on the Hub
    datasets.DatasetDict(made).save_to_disk(tmp_path / "imagenet")
    data = kd.load("imagenet", data_path=tmp_path / "imagenet", validation="none", num_workers=0)
    assert (len(data.train), len(data.test)) == (6, 3) and data.image_size == (224, 224)
    assert data.augment is None and "RandomResizedCrop" in data.details["augmentation"]
    batch = next(iter(data.train.loader(6)))
    assert batch["x"].shape == (6, 3, 224, 224)
    preset = kd.PRESETS["imagenet"]
    assert (preset.hub_id, preset.num_classes) == ("ILSVRC/imagenet-1k", 1000)
    for option in (None, "none", "crop-flip"):
        train, evaluation = describe_unread(check_transforms(option), None, (224, 224), False)
        whole = kd.load(
            "imagenet", data_path=tmp_path / "imagenet", transforms=option, validation="none"
        )
        assert whole.details["augmentation"] == train
        assert whole.details["evaluation"] == evaluation


# --- errors


def corrupt(at=7, payload=b"\x89PNG\r\n\x1a\nbroken"):
    rows = (
        load_digits()["train"].select(range(30)).cast_column("image", datasets.Image(decode=False))
    )
    broken = rows.map(
        lambda row, i: {"image": {"bytes": payload, "path": None}} if i == at else row,
        with_indices=True,
    )
    return broken.cast_column("image", datasets.Image())


def normalised(small):
    steps = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Lambda(lambda x: x.expand(3, -1, -1)),
    ]
    return v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.25] * 3)])


def garbage_parquet(root, content):
    (root / "train-00000.parquet").write_bytes(content)
    return root


def truncated_parquet(small, root):
    file = write_parquet(small, root) / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    return root


def empty_parquet(small, root):
    small["train"].select([]).to_parquet(str(root / "train-0.parquet"))
    return root


def loader_of(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), 8, **options)


X, Y = torch.zeros(16, 3, 4, 4), torch.arange(16) % 2

ERRORS = {
    "corrupt image": (
        lambda s, p: kd.load(corrupt()),
        r"split 'train', row 7: the image cannot be decoded",
    ),
    "missing image": (
        lambda s, p: kd.load(
            table(cls=(FINE, [0, 1] * 20)).map(
                lambda r, i: {"image": None} if i == 3 else r, with_indices=True
            )
        ),
        r"row 3: the image cannot be decoded: empty",
    ),
    "label too large": (
        lambda s, p: kd.load(table(cls=(INT, [0, 1] * 19 + [7, 1])), num_classes=2),
        r"split 'train', row 38: label 7 is outside 0 \.\. 1",
    ),
    "no label column": (
        lambda s, p: kd.load(s["train"].remove_columns("label")),
        r"no label column",
    ),
    "string labels": (
        lambda s, p: kd.load(table(c=(datasets.Value("string"), ["a"] * 40))),
        r"no label column: .* Say which with columns=\(None, label\); text becomes classes",
    ),
    "two integer columns": (
        lambda s, p: kd.load(table(a=(INT, [0] * 40), b=(INT, [0] * 40))),
        r"a, b\. Say which",
    ),
    "no image column": (
        lambda s, p: kd.load(s["train"].remove_columns("image")),
        r"no column of type datasets\.Image",
    ),
    "unknown column": (
        lambda s, p: kd.load(s, columns=("imag", None)),
        r"no column 'imag'.*Did you mean 'image'\?",
    ),
    "empty data": (lambda s, p: kd.load(s["train"].select([])), r"split 'train' holds no rows"),
    "empty parquet": (lambda s, p: kd.load(empty_parquet(s, p)), r"train-0\.parquet holds no rows"),
    "cut parquet": (
        lambda s, p: kd.load(truncated_parquet(s, p)),
        r"train-00000-of-00001\.parquet is not a whole parquet",
    ),
    "not parquet": (
        lambda s, p: kd.load(garbage_parquet(p, b"x" * 99)),
        r"train-00000\.parquet is not a whole parquet",
    ),
    "zero bytes": (
        lambda s, p: kd.load(garbage_parquet(p, b"")),
        r"train-00000\.parquet is not a whole parquet",
    ),
    "empty folder": (lambda s, p: kd.load(p), r"holds no data that is known"),
    "type": (lambda s, p: kd.load(3), r"data of type int: expected an HF Dataset"),
    "data_path": (
        lambda s, p: kd.load(s, data_path=p),
        r"is a local copy of a named data set, not of DatasetDict",
    ),
    "num_classes": (
        lambda s, p: kd.load(s, num_classes=37),
        r"num_classes=37, but the data has 10 classes",
    ),
    "class order": (
        lambda s, p: kd.load(
            s, s["test"].cast_column("label", datasets.ClassLabel(names=list("0132456789")))
        ),
        r"class 2 is \['2'\] in train and \['3'\] in test",
    ),
    "no train split": (
        lambda s, p: kd.load(datasets.DatasetDict(a=s["train"], b=s["test"])),
        r"splits a, b, no 'train'",
    ),
    "validation": (
        lambda s, p: kd.load(s, validation="some"),
        r"validation='some': allowed are 'auto'",
    ),
    "validation of all": (lambda s, p: kd.load(s, validation=300), r"holds out 300 of 300"),
    "validation on a stream": (
        lambda s, p: kd.load(as_stream(s, p), validation=0.1),
        r"validation=0\.1: rows of a stream",
    ),
    "train_limit": (
        lambda s, p: kd.load(s, train_limit=0),
        r"train_limit is 0; allowed: a whole number from 1",
    ),
    "transforms": (
        lambda s, p: kd.load(s, transforms="flip"),
        r"transforms='flip': allowed are None",
    ),
    "normalised": (
        lambda s, p: kd.load(s, transforms=normalised(s)),
        r"values from -2 to .*remove Normalize",
    ),
    "not a tensor": (lambda s, p: kd.load(s, transforms=lambda i: 3), r"the image is int"),
    "one channel too many": (
        lambda s, p: kd.load(s, transforms=lambda i: torch.zeros(4, 8, 8)),
        r"shape \(4, 8, 8\)",
    ),
    "num_workers": (
        lambda s, p: kd.load(s, num_workers=-1),
        r"num_workers is -1; allowed: a whole number from 0 .*or 'auto'",
    ),
    "image_size": (lambda s, p: kd.load(s, image_size=0), r"image_size=0: a number of pixels"),
    "normalised tensors": (lambda s, p: kd.load(TensorDataset(X - 2, Y)), r"remove Normalize"),
    "unlabelled loader": (lambda s, p: kd.load(loader_of(X), num_classes=2), r"labels are needed"),
    "unlabelled dict": (
        lambda s, p: kd.load(DataLoader([{"image": x} for x in X], 8), num_classes=2),
        r"no key for a label",
    ),
    "normalised loader": (lambda s, p: kd.load(loader_of(X - 2, Y)), r"remove Normalize"),
    "labels of a loader": (
        lambda s, p: batches(kd.load(loader_of(X, Y), num_classes=1).train),
        r"split 'train', row 1: label 1 is outside 0 \.\. 0",
    ),
    "classes of a loader": (
        lambda s, p: kd.load(DataLoader(list(zip(X, Y, strict=True)), 8)),
        r"pass num_classes=",
    ),
    "loader without batches": (
        lambda s, p: kd.load(DataLoader(TensorDataset(X, Y), batch_size=None)),
        r"batch_size=None: pass its data set",
    ),
    "workers of a loader": (
        lambda s, p: kd.load(loader_of(X, Y), num_workers=3),
        r"num_workers=3, but the DataLoader has 0",
    ),
    "transforms of a loader": (
        lambda s, p: kd.load(loader_of(X, Y), transforms=to_float),
        r"no effect on a DataLoader",
    ),
    "views": (
        lambda s, p: (lambda d: d.prepare_batch(batch_of(d), epoch=0, train=True, views=2))(
            kd.load(s, transforms="none")
        ),
        r"2 views need a batched augmentation",
    ),
    "reflect too far": (
        lambda s, p: (lambda d: d.prepare_batch(batch_of(d), epoch=0, train=True))(
            kd.load(s, transforms=BatchAugment(16, "reflect"))
        ),
        r"reflect padding of 16 px needs images larger than 16x16",
    ),
    "mode": (
        lambda s, p: BatchAugment(mode="edge"),
        r"mode of BatchAugment is 'edge'; allowed: 'zeros', 'reflect'",
    ),
    "flip": (
        lambda s, p: BatchAugment(flip=2),
        r"flip of BatchAugment is 2; allowed: a finite number from 0 up to 1",
    ),
    "sizes of a batch": (
        lambda s, p: batches(
            kd.load(odd_sizes(), transforms=v2.PILToTensor(), num_workers=0).train
        ),
        r"a batch needs equal sizes",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case, small, tmp_path):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call(small, tmp_path)


def test_unreachable_hub_names_the_way_out(monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"uoft-cs/cifar10.*--data PATH or data_path=") as e:
        kd.load("cifar10")
    assert isinstance(e.value.__cause__, ConnectionError)
    for name in ("mnist", "imagenet-1k", "someone/cifar10"):  # of the Hub, not misspelt
        with pytest.raises(OSError, match="could not be fetched from the Hub.*Presets: cifar10"):
            kd.load(name)
    for missing in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            kd.load(missing)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        kd.load("cifar10", data_path=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "meant"), [("cifar", "cifar10"), ("CIFAR-100", "cifar100"), ("digit", "digits")]
)
def test_misspelt_preset_never_asks_the_hub(monkeypatch, name, meant):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: pytest.fail(f"the Hub was asked for {name}")
    )
    with pytest.raises(ValueError, match=rf"unknown data set '{name}'\. Did you mean .*'{meant}'"):
        kd.load(name)


def test_seeded_restores_after_an_error():
    def fail():
        with seeded_generators(1):
            torch.rand(3)
            raise RuntimeError

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(before, torch.get_rng_state())


def test_imports_are_light():
    heavy = ("datasets", "evaluate", "sklearn", "pandas", "scipy", "pyarrow", "matplotlib")
    code = (
        "import sys, kdtoolkit.data.dataset, kdtoolkit.data.loading, kdtoolkit.metrics\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_fake_data_of_torchvision_reads_its_labels_once():
    data = kd.load(FakeData(20, (3, 8, 8), num_classes=3), num_workers=0)
    assert 2 <= data.num_classes <= 3 and data.image_size == (8, 8)
