"""Splits of dictionaries: names in any case, what is left out, what tests and what chooses."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from kdtoolkit import data as kd
from kdtoolkit import distill


def part(n, classes=2, start=0):
    labels = (torch.arange(n) + start) % classes
    return TensorDataset(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), labels)


def sizes(data):
    return [None if s is None else len(s) for s in (data.train, data.val, data.test)]


def load(splits, **options):
    found = {name: part(n) for name, n in splits.items()}
    return kd.load(found, num_workers=0, transforms="none", **options)


# given splits, options -> rows of train, val, test; notes
SPLITS = {
    "all": (dict(train=40, validation=8, test=6), {}, [40, 8, 6], []),
    "any case": (dict(Train=40, VALID=8, Testing=6), {}, [40, 8, 6], []),
    "spaces": ({" train ": 40, "test": 6}, {}, [36, 4, 6], []),
    "aliases": (dict(training=40, dev=8, eval=6), {}, [40, 8, 6], []),
    "extra": (
        dict(train=40, val=8, test=6, extra=99, holdout=7),
        {},
        [40, 8, 6],
        [
            r"split 'extra' \(99 rows\) is left out: its name is not that of a training",
            r"split 'holdout' \(7 rows\) is left out",
        ],
    ),
    "two validations": (
        dict(train=40, val=8, validation=9, test=6),
        {},
        [40, 9, 6],
        [r"split 'val' \(8 rows\) is left out: 'validation' is the validation split"],
    ),
    "eval beside test": (
        dict(train=40, val=8, eval=5, test=6),
        {},
        [40, 8, 6],
        [r"split 'eval' \(5 rows\) is left out: 'test' is the test split"],
    ),
    "train in two cases": (
        dict(train=40, Train=30, test=6),
        {},
        [36, 4, 6],
        [r"split 'Train' \(30 rows\) is left out: 'train' is the training split"],
    ),
    "the only split": (
        dict(test=40),
        {},
        [29, 3, 8],
        [r"'test', the only split, is trained on", r"8 training rows, drawn by class, are the"],
    ),
    "validation and no test": (
        dict(train=40, val=8),
        {},
        [40, 8, None],
        [r"there is no test split: the source's val split chooses the epoch"],
    ),
    "validation and no test, the last epoch": (
        dict(train=40, val=8),
        dict(validation="none"),
        [40, None, 8],
        [r"there is no test split: the source's val split is the test set"],
    ),
    "validation and no test, chosen on train": (
        dict(train=40, val=8),
        dict(validation=0.1),
        [36, 4, 8],
        [r"there is no test split: the source's val split is the test set"],
    ),
    "validation and no test, chosen on the test": (
        dict(train=40, val=8),
        dict(validation="test"),
        [40, 8, 8],
        [r"there is no test split: the source's val split is the test set"],
    ),
    "validation not wanted": (
        dict(train=40, val=8, test=6),
        dict(validation="none"),
        [40, None, 6],
        [r"the source's val split is left out: validation='none'"],
    ),
    "validation in place of the source's": (
        dict(train=40, val=8, test=6),
        dict(validation=10),
        [30, 10, 6],
        [r"the source's val split is left out: validation=10"],
    ),
    "neither": (
        dict(train=40),
        {},
        [29, 3, 8],
        [r"there is no test split: 8 training rows, drawn by class, are the test set"],
    ),
    "eval_data": (
        dict(train=40, val=8, test=6),
        dict(eval_data=part(5)),
        [40, 8, 5],
        [r"split 'test' \(6 rows\) is left out: eval_data is the test split"],
    ),
    "eval_data of several splits": (
        dict(train=40, val=8),
        dict(eval_data={"train": part(4), "test": part(5), "more": part(3)}),
        [40, 8, 5],
        [r"eval_data: split 'more' \(3 rows\) is left out", r"eval_data: split 'train' \(4 rows\)"],
    ),
    "eval_data of a validation split": (
        dict(train=40),
        dict(eval_data={"train": part(4), "dev": part(5)}),
        [36, 4, 5],
        [r"eval_data: split 'train' \(4 rows\) is left out: 'dev' is the test split"],
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits(case):
    splits, options, rows, notes = SPLITS[case]
    data = load(splits, **options)
    assert sizes(data) == rows
    assert len(data.notes) == len(notes), data.notes
    for note, pattern in zip(data.notes, notes, strict=True):
        assert re.search(pattern, note), note


@pytest.mark.parametrize("splits", [dict(a=3, b=4), dict(val=3, test=4), {}])
def test_no_training_split(splits):
    with pytest.raises(ValueError, match=r"dict has the splits .*, no 'train': pass one of them"):
        load(splits)


@pytest.mark.parametrize("kind", ["HF", "torch"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_without_labels_are_left_out(kind, split):
    image = datasets.Image().encode_example(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))

    def table(labels):
        if kind == "torch":
            n = len(labels)
            return TensorDataset(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.tensor(labels))
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        rows = {"image": [image] * len(labels), "label": labels}
        return datasets.Dataset.from_dict(rows, features)

    parts = {"train": table([0, 1] * 20), split: table([-1] * 7)}
    data = kd.load(parts, num_workers=0, transforms="none")
    assert f"split {split!r} (7 rows) is left out: its rows have no labels" in data.notes[0]
    assert len(data.train) + len(data.val) + len(data.test) == 40


def test_loaders_and_streams_by_split():
    loaders = {n: DataLoader(part(8), 4) for n in ("Train", "val", "extra")}
    data = kd.load(loaders)
    assert data.test is None and data.val.name == "val"
    assert "split 'extra' (8 rows) is left out" in data.notes[0]
    assert kd.load(loaders, validation="none").test.name == "test"


def test_classes_without_rows_are_told_by_split():
    splits = {
        "train": TensorDataset(torch.zeros(9, 3, 8, 8), torch.tensor([0, 1, 3] * 3)),
        "val": TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 3])),
        "test": TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 0, 2])),
    }
    data = kd.load(splits, num_workers=0)
    assert data.notes == [
        "1 of 4 classes have no rows in train: 2",
        "1 of 4 classes have no rows in val: 2",
        "2 of 4 classes have no rows in test: 1, 3",
    ]


def test_the_plan_and_the_run_say_it(caplog, tmp_path):
    splits = {"train": part(16), "val": part(8), "extra": part(3)}
    run = dict(student="cifar_resnet8", train_data=splits, method="none", batch_size=8, max_steps=1)
    lines = str(distill(**run, dry_run=True).plan).replace("\n", " ")
    assert "note: split 'extra' (3 rows) is left out" in lines
    assert "note: there is no test split: the source's val split chooses the epoch" in lines
    with caplog.at_level("INFO", logger="kdtoolkit"):
        result = distill(**run, num_workers=0, progress="lines", report_to="none")
    assert "split 'extra' (3 rows) is left out" in caplog.text
    assert result.metrics["split"] == "val"
