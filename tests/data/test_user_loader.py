"""DataLoaders of users: other parts in a batch, labels of other kinds, empty ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from kdtoolkit import data as kd

X = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
Y = torch.arange(16) % 2


def loader(labels, *parts, **options):
    """A DataLoader over a list, whose labels are not known before they are read."""
    rows = list(zip(X[: len(labels)], labels, *parts, strict=True))
    return DataLoader(rows, 4, **options)


def batches(source):
    return list(kd.load(source, num_classes=2).train.loader(4))


PATHS = [f"images/{k}.png" for k in range(16)]


@pytest.mark.parametrize(
    ("third", "index"),
    [
        (PATHS, range(16)),
        ([k / 2 for k in range(16)], range(16)),
        ([[k, k] for k in range(16)], range(16)),
        ([{"path": path} for path in PATHS], range(16)),
        (range(100, 116), range(100, 116)),
        (torch.arange(100, 116), range(100, 116)),
    ],
    ids=["paths", "floats", "pairs", "dicts", "row numbers", "tensor"],
)
def test_a_third_part_that_is_no_row_number_is_left_alone(third, index):
    got = batches(loader(Y, third))
    assert torch.cat([batch["index"] for batch in got]).tolist() == list(index)
    assert torch.equal(torch.cat([batch["y"] for batch in got]), Y)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"] * 8, r"the labels are text \('cat', ...\), a batch needs whole numbers"),
        ([-1] * 16, r"split 'train', row 0: label -1 is outside 0 \.\. 1 .*a row without a label"),
        (
            [*[0, 1] * 7, 0, -1],
            r"split 'train', row 15: label -1 is outside 0 \.\. 1\. It is",
        ),
        ([0.5] * 16, r"image 0 of a batch: the label is 0\.5, which is no class id"),
        ([float("nan")] * 16, r"image 0 of a batch: the label is NaN"),
        (torch.eye(2)[Y], r"labels are \(4, 2\) .* one-hot and soft labels are not supported"),
        (Y[:, None], r"labels are \(4, 1\) .*: remove the last dimension"),
        ([None] * 16, r"the labels are tuple, expected \(4,\) integers"),
        ([2] * 16, r"split 'train', row 0: label 2 is outside 0 \.\. 1 \(4 such rows\)"),
    ],
)
def test_labels_that_are_refused(labels, message):

    def collate(rows):  # torch's own refuses None in its own words
        images, others = zip(*rows, strict=True)
        return torch.stack(images), others

    own = isinstance(labels, list) and labels[0] is None
    source = loader(labels, collate_fn=collate) if own else loader(labels)
    with pytest.raises(ValueError, match=message) as error:
        batches(source)
    assert "4611686018427387903" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint8, bool])
def test_whole_labels_of_other_types(kind):
    got = batches(
        loader(np.arange(16) % 2 == 1 if kind is bool else (np.arange(16) % 2).astype(kind))
    )
    assert torch.equal(torch.cat([batch["y"] for batch in got]), Y)
    assert got[0]["y"].dtype == torch.int64


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


EMPTY = TensorDataset(X[:0], Y[:0])
WHOLE = TensorDataset(X, Y)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: DataLoader(EMPTY, 4), r"DataLoader of split 'train' is empty"),
        (
            lambda: DataLoader(WHOLE, 32, drop_last=True),
            r"'train' makes no batch: its data set holds 16 rows, batch_size is 32 and drop_last",
        ),
        (
            lambda: DataLoader(WHOLE, 4, sampler=SubsetRandomSampler([])),
            r"'train' makes no batch: .*a sampler that draws rows",
        ),
        (lambda: DataLoader(WHOLE, batch_sampler=[]), r"'train' makes no batch"),
        (lambda: DataLoader(Nothing(), 4), r"'train' holds no rows"),
        (
            lambda: {"train": DataLoader(WHOLE, 4), "val": DataLoader(EMPTY, 4)},
            r"DataLoader of split 'val' is empty",
        ),
    ],
)
def test_empty_loaders(source, message):
    with pytest.raises(ValueError, match=message):
        kd.load(source(), num_classes=2)


def test_an_empty_test_loader_of_a_split():
    with pytest.raises(ValueError, match=r"DataLoader of split 'test' is empty"):
        kd.load(DataLoader(WHOLE, 4), DataLoader(EMPTY, 4))


def test_text_that_the_data_set_states():
    class Named(torch.utils.data.Dataset):
        targets = ["cat", "dog"] * 8

        def __len__(self):
            return 16

        def __getitem__(self, row):
            return X[row], self.targets[row]

    with pytest.raises(ValueError, match=r"data set are text \('cat', ...\).*pass the data set"):
        kd.load(DataLoader(Named(), 4))
    assert kd.load(Named(), num_workers=0).class_names == ["cat", "dog"]
