"""Labels of every kind in every source: the same classes, or a sentence that names the row."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from kdtoolkit import data as kd
from kdtoolkit.data.label_values import (
    as_label_array,
    plain_label,
    read_label_values,
    sorted_names,
)
from kdtoolkit.data.raw_labels import RawLabels

IMAGE = Image.fromarray(np.zeros((4, 4, 3), np.uint8))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def images(n):
    return torch.zeros(n, 3, 4, 4, dtype=torch.uint8)


class Items(Dataset):
    """Items that do not state their labels."""

    def __init__(self, labels):
        self.labels_of_rows = labels

    def __len__(self):
        return len(self.labels_of_rows)

    def __getitem__(self, row):
        return images(1)[0], self.labels_of_rows[row]


class Stated(Items):
    """Items with `targets`, as torchvision's."""

    @property
    def targets(self):
        return self.labels_of_rows


def column(values, feature=None, name="label"):
    encoded = datasets.Image().encode_example(IMAGE)
    table = datasets.Dataset.from_dict({"image": [encoded] * len(values)})
    table = table.cast_column("image", datasets.Image())
    return table.add_column(name, values, feature=feature)


SOURCES = {
    "column": column,
    "stated": Stated,
    "items": Items,
    "subset": lambda labels: Subset(Stated(labels), list(range(len(labels)))),
    "two parts": lambda labels: ConcatDataset([Stated(labels[:9]), Stated(labels[9:])]),
}
LABELS = {  # labels that repeat -> class names, class ids of the pattern
    "numbers": ([0, 1, 2], None, [0, 1, 2]),
    "whole floats": ([0.0, 1.0, 2.0], None, [0, 1, 2]),
    "bools": ([False, True], None, [0, 1]),
    "a class without rows": ([0, 1, 3], None, [0, 1, 3]),
    "from 1": ([1, 2, 3, 4], ("1", "2", "3", "4"), [0, 1, 2, 3]),
    "ids": ([999, 5, 9], ("5", "9", "999"), [2, 0, 1]),
    "two far numbers": ([0, 7], ("0", "7"), [0, 1]),
    "text": (["dog", "cat"], ("cat", "dog"), [1, 0]),
    "text of numbers": (["10", "9", "0"], ("0", "9", "10"), [2, 1, 0]),
}


def ids_of(data):
    """Class ids by row, of all splits."""
    found = {}
    for split in (data.train, data.val, data.test):
        if split is not None:
            for batch in split.loader(64):
                found |= dict(zip(batch["index"].tolist(), batch["y"].tolist(), strict=True))
    return [found[row] for row in sorted(found)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", LABELS)
def test_labels_become_the_same_classes_in_every_source(case, source):
    pattern, names, ids = LABELS[case]
    labels = (pattern * 20)[:36]
    data = kd.load(SOURCES[source](labels), num_workers=0, transforms="none")
    assert data.class_names == (list(names) if names else None)
    assert data.num_classes == (len(names) if names else max(ids) + 1)
    assert ids_of(data) == (ids * 20)[:36]
    renumbered = [note for note in data.notes if note.startswith("labels ")]
    assert bool(renumbered) == (case in ("from 1", "ids", "two far numbers"))
    empty = [note for note in data.notes if "have no rows in train: 2" in note]
    assert len(empty) == (1 if case == "a class without rows" else 0)


def test_num_classes_keeps_labels_as_they_are():
    data = kd.load(Stated([5, 9] * 10), num_classes=12, num_workers=0, transforms="none")
    assert (data.num_classes, data.class_names) == (12, None) and ids_of(data) == [5, 9] * 10
    assert "10 of 12 classes have no rows in train: 0, 1, 2, 3, 4, 6, 7, 8 and 2 more" in data.notes


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 1] * 8, np.int8),
        np.array([0, 1] * 8, np.uint64),
        np.array([0, 1] * 8, np.float32),
        np.array(["a", "b"] * 8),
        torch.tensor([0, 1] * 8, dtype=torch.int16),
        torch.tensor([0.0, 1.0] * 8, dtype=torch.bfloat16),
        torch.tensor([False, True] * 8),
        [torch.tensor(0), torch.tensor(1)] * 8,
        [np.int64(0), np.float64(1.0)] * 8,
        [np.str_("a"), "b"] * 8,
    ],
    ids=repr,
)
def test_types_of_arrays(values):
    for source in (Stated, Items):
        assert ids_of(kd.load(source(values), num_workers=0, transforms="none")) == [0, 1] * 8


def at(row, label, n=20):
    labels = [0, 1] * (n // 2)
    labels[row] = label
    return labels


NAN = float("nan")
ROW = r"split 'train', row 7"
REFUSED = {
    "half": (at(7, 0.5), ROW + r".*: the label is 0\.5, which is no class id"),
    "nan": (at(7, NAN), ROW + r".*: the label is NaN: remove the row"),
    "infinite": (at(7, float("inf")), ROW + r".*: the label is inf"),
    "below -1": (at(7, -2), ROW + r": label -2 is outside 0 \.\. 1"),
    "too large": (at(7, 2**63), ROW + r": the label 9223372036854775808 is too large"),
    "one-hot": ([torch.eye(2)[k % 2] for k in range(20)], r"row 0: the label .* has the shape \(2"),
    "one number in a list": ([[k % 2] for k in range(20)], r"the shape \(1,\).*squeeze"),
    "bytes": ([b"a", b"b"] * 10, r"row 0: the label is b'a' \(bytes\)"),
    "text and numbers": (at(7, "x"), r"row 7 is text \('x'\), that of row 0 a number"),
    "one for each row": (list(range(20)), r"20 different values in 20 rows"),
    "a text for each row": ([f"n{k}" for k in range(20)], r"20 different values in 20 rows"),
    "one class": ([1] * 20, r"every training label is 1: there is a single class"),
    "one text": (["a"] * 20, r"a single class, 'a', and nothing to learn"),
    "minus one and one": ([-1, 1] * 10, r"labels are -1 and 1: -1 is the label of a row without"),
    "all unlabelled": ([-1] * 20, r"none of 20 training rows has a label"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_are_refused(case):
    labels, message = REFUSED[case]
    for source in (Stated, Items):
        with pytest.raises(ValueError, match=message):
            kd.load(source(labels), num_workers=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 1.0] * 5 + [0.5, 1.0], r"split 'train', row 10: the label is 0\.5"),
        ([0.0, 1.0] * 5 + [NAN, NAN], r"split 'train', row 10 \(2 such rows\): the label is NaN"),
        ([[0, 1]] * 12, r"label column 'label' has type .*Multi-label, one-hot and soft labels"),
        ([[0.5, 0.5]] * 12, r"label column 'label' has type .*Multi-label, one-hot and soft"),
        ([{"a": 1}] * 12, r"label column 'label' has type"),
        (list(range(12)), r"column 'label' holds 12 different values in 12 rows"),
        ([f"x{k}" for k in range(12)], r"column 'label' holds 12 different values in 12 rows"),
        ([None] * 12, r"none of 12 training rows has a label"),
    ],
)
def test_columns_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        kd.load(column(values))


def test_rows_without_a_label():
    for labels in ([0, 1, None] * 8, ["a", "b", None] * 8, [0.0, 1.0, None] * 8):
        for source in (Stated(labels), column(labels)):
            data = kd.load(source, num_workers=0, transforms="none", validation="none")
            assert data.num_unlabelled == 8 and data.num_classes == 2


def test_a_dictionary_column_and_other_text_types():
    for kind in (pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        texts = pa.chunked_array([pa.array(["b", "a"] * 8).cast(kind)])
        assert read_label_values(texts, "train").tolist() == ["b", "a"] * 8


# --- several splits
def splits(train, test):
    return datasets.DatasetDict(train=column(train), test=column(test))


def test_text_of_other_splits_is_matched_by_name():
    data = kd.load(splits(["a", "b", "c"] * 5, ["c"] * 4), transforms="none")
    assert data.class_names == ["a", "b", "c"]
    assert {int(y) for y in data.test.dataset.labels} == {2}
    assert "2 of 3 classes have no rows in test: a, b" in data.notes
    declared = column([2, 1, 0] * 5, datasets.ClassLabel(names=["c", "b", "a"]))
    text = column(["a", "b", "c"] * 5)  # the same labels
    data = kd.load(text, declared, transforms="none")
    assert data.class_names == ["a", "b", "c"]
    assert data.test.dataset.labels.tolist() == [0, 1, 2] * 5
    data = kd.load(declared, text, transforms="none")
    assert data.class_names == ["c", "b", "a"]
    assert data.test.dataset.labels.tolist() == [2, 1, 0] * 5


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b"] * 8, ["a", "Bb"], r"split 'test', row 1: label 'Bb' is none of .*mean 'b'"),
        (["a", "b"] * 8, [0, 1], r"labels of train are text \('a', ...\), those of test whole"),
        ([0, 1] * 8, ["a", "b"], r"labels of train are whole numbers, those of test text"),
        ([1, 2] * 8, [1, 0], r"split 'test', row 1: label 0 is none of the training data's \(1, 2"),
        ([0, 1] * 8, [1, 2], r"split 'test', row 1: label 2 is outside 0 \.\. 1"),
        ([0, 1] * 8, [1, None], r"split 'test', row 1: label -1 is outside .*Remove it"),
    ],
)
def test_splits_that_disagree(train, test, message):
    with pytest.raises(ValueError, match=message):
        kd.load(splits(train, test))


def test_loaders_and_streams_cannot_be_numbered_again():
    loader = DataLoader(TensorDataset(images(8), torch.tensor([1, 2] * 4)), 4)
    with pytest.raises(ValueError, match=r"labels are 1, 2, .*DataLoader.*num_classes=3"):
        kd.load(loader)
    assert kd.load(loader, num_classes=3).num_classes == 3
    stream = column(["a", "b"] * 8).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"label column 'label' of a stream is text"):
        kd.load(stream)
    halves = kd.load(column([0.0] * 8 + [0.5] * 8).to_iterable_dataset(), num_classes=2)
    with pytest.raises(ValueError, match=r"row 8 of the stream: the label is 0\.5"):
        list(halves.train.loader(4))


# --- properties
NAMES = st.lists(st.text(max_size=5), unique=True, min_size=2, max_size=8)
few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@given(st.lists(st.integers(-1000, 1000), unique=True, min_size=1))
def test_numbers_are_sorted_as_numbers(numbers):
    assert sorted_names(map(str, numbers)) == [str(k) for k in sorted(numbers)]


@few
@given(NAMES, st.randoms(use_true_random=False))
def test_order_of_classes_does_not_depend_on_the_order_of_rows(names, random):
    shuffled = random.sample(names, len(names))
    assert sorted_names(shuffled) == sorted_names(names)


@few
@given(NAMES, st.data())
def test_text_survives_the_way_to_class_ids_and_back(names, data):
    rows = data.draw(st.lists(st.sampled_from([*names, None]), min_size=1, max_size=30))
    raw = RawLabels(np.array(rows, dtype=object), "train")
    codes = raw.codes()
    assert [None if code < 0 else raw.texts[code] for code in codes] == rows
    assert set(raw.texts) == {row for row in rows if row is not None}


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_whole_numbers_are_the_same_in_every_type(labels):
    for kind in (np.int8, np.uint16, np.float16, np.float64):
        found = as_label_array(np.array(labels, kind), len(labels), "train")
        assert found.dtype == np.int64 and found.tolist() == labels
    assert as_label_array(torch.tensor(labels), len(labels), "train").tolist() == labels
    assert [plain_label(np.float32(label), "row") for label in labels] == labels


@few
@given(st.floats().filter(lambda x: not x.is_integer()))
def test_no_float_is_cut(number):
    for value in (number, np.float64(number), torch.tensor(number, dtype=torch.float64)):
        with pytest.raises(ValueError, match="row 3: the label is"):
            plain_label(value, "row 3")
    with pytest.raises(ValueError, match="split 'train', row 1: the label is"):
        as_label_array([0.0, number], 2, "train")


@few
@given(st.sets(st.integers(0, 40), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_classes_keep_their_order_and_number(values, seed):
    """Whatever the numbers are, rows of one label are one class, in the order of the numbers."""
    values = sorted(values)
    rows = np.random.default_rng(seed).permutation(values * 6)
    data = kd.load(Stated(rows), num_workers=0, transforms="none", validation="none")
    ids = ids_of(data)
    pairs = sorted(set(zip(rows.tolist(), ids, strict=True)))
    assert [value for value, _ in pairs] == values
    assert [code for _, code in pairs] == sorted({code for _, code in pairs})
    if data.class_names:  # numbered again
        assert [code for _, code in pairs] == list(range(len(values)))
        assert data.class_names == [str(value) for value in values]
    else:
        assert ids == rows.tolist() and data.num_classes == values[-1] + 1
