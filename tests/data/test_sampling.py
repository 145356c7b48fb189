"""RowDataset without a label, and batches whose rows a method chooses: real digits throughout."""

from __future__ import annotations

import re

import datasets
import numpy as np
import paper_totals
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from kdtoolkit import data as kd
from kdtoolkit import functional
from kdtoolkit.data.presets import load_digits
from kdtoolkit.data.sampling import Mixed, OwnBatches, SameClass
from kdtoolkit.methods.peers import Peers
from kdtoolkit.types import Clock

HIDDEN = np.arange(300) % 3 == 0  # a hundred of the small data set's training rows


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="session")
def small():
    """300 digits to train on and 100 to test, as an HF DatasetDict."""
    both = load_digits()
    return datasets.DatasetDict(
        train=both["train"].select(range(300)), test=both["test"].select(range(100))
    )


def pixels(split):
    x = np.stack([np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1) for row in split])
    return torch.from_numpy(x), torch.tensor(split["label"][:])


def with_labels(part, labels, kind=None):
    kind = part.features["label"] if kind is None else kind
    return part.remove_columns("label").add_column("label", labels, feature=kind)


class Listed(Dataset):
    """A data set that says what its labels are, and gives None for those it does not have."""

    def __init__(self, x, targets, form):
        self.x, self.targets, self.form = x, targets, form

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        image = self.x[i]
        return (
            (image, self.targets[i])
            if self.form == "pairs"
            else {"image": image, "label": self.targets[i]}
        )


def partly(small, kind):
    """The small data set without a third of its training labels, and its true labels."""
    train, truth = small["train"], np.array(small["train"]["label"])
    if kind == "null":
        gone = [None if h else int(y) for h, y in zip(HIDDEN, truth, strict=True)]
        return datasets.DatasetDict(train=with_labels(train, gone), test=small["test"]), truth
    minus = np.where(HIDDEN, -1, truth)
    if kind == "minus one":
        return datasets.DatasetDict(
            train=with_labels(train, minus.tolist()), test=small["test"]
        ), truth
    (x, _), (tx, ty) = pixels(train), pixels(small["test"])
    test = TensorDataset(tx, ty)
    if kind == "tensors":
        return (TensorDataset(x, torch.from_numpy(minus)), test), truth
    gone = [None if h else int(y) for h, y in zip(HIDDEN, truth, strict=True)]
    return (Listed(x, gone, kind), test), truth


def rows_of(loader):
    return [batch["index"].tolist() for batch in loader]


def whole(split, size=64):
    found = list(split.loader(size))
    return {k: torch.cat([b[k] for b in found]) for k in ("x", "y", "index")}


# ------------------------------------------------------------------------------------------------
# rows without a label
@pytest.mark.parametrize("kind", ["null", "minus one", "tensors", "pairs", "dicts"])
@pytest.mark.parametrize("transforms", [None, v2.PILToTensor()], ids=["in memory", "row by row"])
def test_rows_without_a_label_are_kept_to_train_on_alone(small, kind, transforms):
    source, truth = partly(small, kind)
    train, test = source if isinstance(source, tuple) else (source, None)
    data = kd.load(train, test, validation=40, transforms=transforms, num_workers=0)
    got = whole(data.train)
    known = HIDDEN[got["index"]]
    assert data.num_classes == 10 and data.num_unlabelled == 100 == int((got["y"] < 0).sum())
    assert (got["y"].numpy() == np.where(known, -1, truth[got["index"]])).all()
    held = whole(data.val)
    assert (
        len(held["y"]) == 40
        and not HIDDEN[held["index"]].any()
        and not set(held["index"]) & set(got["index"])
    )
    share = np.bincount(truth[~HIDDEN]) * 40 / 200
    assert np.abs(held["y"].bincount().numpy() - share).max() < 1
    assert "100 of 260 training rows have no label" in data.describe()["labels"]
    assert kd.load(small).num_unlabelled == 0 and "labels" not in kd.load(small).describe()


def test_limits_and_held_out_test_rows_cope_with_rows_without_a_label(small):
    source, _ = partly(small, "null")
    limited = kd.load(source, validation=40, train_limit=130)
    assert limited.num_unlabelled == 50 and len(limited.train) == 130  # as many as in the whole
    alone = kd.load(source["train"])
    assert (
        len(alone.test) == 40 and len(alone.val) == 16 and alone.num_unlabelled == 100
    )  # shares of the 200 labelled ones
    assert whole(alone.test)["y"].min() >= 0 and whole(alone.val)["y"].min() >= 0


@pytest.mark.parametrize("labelled", [50, 0.2])
@pytest.mark.parametrize("kind", ["hf", "torch", "row by row"])
def test_labelled_hides_the_other_labels_by_class(small, labelled, kind):
    train, test = (TensorDataset(*pixels(small[s])) for s in ("train", "test"))
    source = (train, test) if kind == "torch" else (small["train"], small["test"])
    options = {"transforms": v2.PILToTensor(), "num_workers": 0} if kind == "row by row" else {}
    plain = kd.load(*source, validation=50, **options)
    data = kd.load(*source, validation=50, labelled=labelled, **options)
    truth, got = whole(plain.train), whole(data.train)
    assert torch.equal(truth["index"], got["index"]) and torch.equal(truth["x"], got["x"])
    kept = got["y"] >= 0
    assert (
        int(kept.sum()) == 50
        and data.num_unlabelled == 200
        and torch.equal(got["y"][kept], truth["y"][kept])
    )
    assert np.abs(got["y"][kept].bincount().numpy() - truth["y"].bincount().numpy() / 5).max() < 1
    assert all(
        torch.equal(whole(a)["y"], whole(b)["y"])
        for a, b in ((plain.val, data.val), (plain.test, data.test))
    )
    for leak in (data.train.dataset.row_labels(), data.train.dataset.__getitems__([0, 1, 2])["y"]):
        assert (np.asarray(leak) < 0).any() and set(np.unique(leak)) <= {-1, *got["y"].tolist()}
    assert f"as asked: labelled={labelled}" in data.describe()["labels"]
    other = kd.load(*source, validation="none", labelled=labelled, seed=1, **options)
    again = kd.load(*source, validation="none", labelled=labelled, seed=1, **options)
    assert torch.equal(whole(other.train)["y"], whole(again.train)["y"])
    assert not torch.equal(
        whole(kd.load(*source, validation="none", labelled=labelled).train)["y"],
        whole(again.train)["y"],
    )
    if kind == "torch":
        assert int(train.tensors[1].min()) == 0  # the user's own labels are untouched


def test_labelled_counts_after_the_limit_and_takes_all(small):
    data = kd.load(small, validation="none", train_limit=200, labelled=0.1)
    assert len(data.train) == 200 and data.num_unlabelled == 180
    assert kd.load(small, validation="none", labelled=300).num_unlabelled == 0
    source, _ = partly(small, "null")
    assert (
        kd.load(source, validation="none", labelled=0.5).num_unlabelled == 200
    )  # a share of those that have a label


class Untold(Listed):
    """Only reading its items tells the labels, and its classes have names."""

    def __init__(self, x, targets):
        super().__init__(x, None, "pairs")
        self.hidden, self.classes = targets, [str(i) for i in range(10)]

    def __getitem__(self, i):
        return self.x[i], self.hidden[i]


def untold(small, gone):
    x, y = pixels(small["train"])
    return Untold(x, [None if i == gone else int(v) for i, v in enumerate(y)])


def as_stream(small):
    return datasets.IterableDatasetDict(
        {name: split.to_iterable_dataset() for name, split in small.items()}
    )


def sampled(data, sampling, size=32):
    return data.train.loader(size, sampling=sampling)


X, Y = torch.zeros(16, 3, 4, 4), torch.arange(16) % 2
ERRORS = {
    "test row": (
        lambda s: kd.load(s["train"], with_labels(s["test"], [-1, *s["test"]["label"][1:]])),
        r"split 'test', row 0: label -1 is outside 0 \.\. 9.*only rows to train on may be that",
    ),
    "below": (
        lambda s: kd.load(TensorDataset(X, Y * -2), num_classes=2),
        r"row 1: label -2 is outside 0 \.\. 1 \(8",
    ),
    "above": (
        lambda s: kd.load(TensorDataset(X, Y * 9 - 1), num_classes=2),
        r"row 1: label 8 is outside 0 \.\. 1",
    ),
    "none": (
        lambda s: kd.load(TensorDataset(X, Y * 0 - 1)),
        r"none of 16 training rows has a label",
    ),
    "none by name": (
        lambda s: kd.load(with_labels(s["train"], [None] * 300)),
        r"none of 300 training rows",
    ),
    "untold": (
        lambda s: whole(kd.load(untold(s, 7), s["test"], num_workers=0).train),
        r"row 7: label -1.*targets",
    ),
    "loader": (
        lambda s: list(
            kd.load(DataLoader(TensorDataset(X, Y - 1), 8), num_classes=2).train.loader(8)
        ),
        r"row 0: label -1 is outside.*map-style",
    ),
    "labelled 0": (
        lambda s: kd.load(s, labelled=0),
        r"labelled=0: a number of rows from 1, or a share",
    ),
    "labelled above": (
        lambda s: kd.load(s, labelled=1.5),
        r"labelled=1\.5: a number of rows from 1, or a share",
    ),
    "labelled True": (lambda s: kd.load(s, labelled=True), r"labelled=True"),
    "too many": (
        lambda s: kd.load(s, labelled=271),
        r"keeps the labels of 271 rows: .* at most the 270 training",
    ),
    "too few": (lambda s: kd.load(s, labelled=9), r"at least one for each of the 10 classes"),
    "labelled stream": (
        lambda s: kd.load(as_stream(s), labelled=20),
        r"labelled=20: rows of a stream",
    ),
    "sampled stream": (
        lambda s: sampled(kd.load(as_stream(s)), Mixed()),
        r"is a stream, this method.*Mixed\(labelled",
    ),
    "sampled loader": (
        lambda s: sampled(kd.load(DataLoader(TensorDataset(X, Y), 8)), SameClass()),
        r"is a DataLoader of your own.*pass a map-style data set",
    ),
    "share": (lambda s: Mixed(1.0), r"labelled of Mixed is 1\.0; allowed: .* above 0 below 1"),
    "partners": (
        lambda s: SameClass(-1),
        r"partners of SameClass is -1; allowed: a whole number from 0",
    ),
    "groups": (lambda s: SameClass(3)(np.zeros(64), 30, 0), r"batch_size 30 does not divide by 4"),
    "partners without": (
        lambda s: SameClass(1)(np.array([0, -1, 0]), 2, 0),
        r"1 training rows have no label",
    ),
    "few": (
        lambda s: SameClass(1)(np.zeros(7), 16, 0),
        r"7 anchors do not fill one batch, which takes 8",
    ),
    "few without": (
        lambda s: Mixed()(np.array([0, 1, -1]), 4, 0),
        r"1 rows without a label do not fill",
    ),
    "nothing known": (
        lambda s: Mixed()(np.full(8, -1), 4, 0),
        r"none of 8 training rows has a label",
    ),
    "one": (lambda s: Mixed()(np.array([0, -1]), 1, 0), r"batch_size is 1; .* need 2 or more"),
    "uneven": (
        lambda s: list(sampled(kd.load(s), lambda labels, size, seed: [[0, 1], [2]], 2)),
        r"made a batch of 1 rows, expected 2",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case, small):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call(small)


# --------------------------------------------------------------------------------------------------
# ----------- batches
@pytest.fixture(scope="module")
def labels():
    """Twenty labelled rows of four classes of unequal size, 100 without a label."""
    drawn = np.repeat([0, 1, 2, 3, -1], [10, 6, 3, 1, 100])
    return np.random.default_rng(0).permutation(drawn)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.1, 0.8])
@pytest.mark.parametrize("size", [8, 12])
def test_mixed_batches(labels, share, size):
    batches = Mixed(share)(labels, size, seed=3)
    many = min(max(round(share * size), 1), size - 1)
    made = list(batches)
    assert len(made) == len(batches) == 100 // (size - many)
    rows = np.array(made)
    assert rows.shape == (len(batches), size) and ((labels[rows] >= 0).sum(1) == many).all()
    others = rows[labels[rows] < 0]
    assert len(np.unique(others)) == len(others)  # each at most once in a pass
    known = rows[labels[rows] >= 0]
    passes = [known[i : i + 20] for i in range(0, len(known) - 19, 20)]
    assert (
        all(len(np.unique(p)) == 20 for p in passes) and len(passes) == many * len(batches) // 20
    )  # shuffled passes
    assert len(passes) < 2 or not np.array_equal(passes[0], passes[1])
    for ranks in (2, 4):
        parts = (labels[rows] >= 0).reshape(len(rows), ranks, size // ranks).sum(2)
        assert np.abs(parts - many / ranks).max() < 1


def test_mixed_without_rows_that_lack_a_label_is_shuffling():
    made = np.array(list(Mixed()(np.arange(50) % 5, 16, seed=1)))
    assert (
        made.shape == (3, 16)
        and len(np.unique(made)) == 48
        and not np.array_equal(made.ravel(), np.sort(made.ravel()))
    )


@pytest.mark.parametrize("partners", [0, 1, 3])
def test_same_class_batches(labels, partners):
    known = labels[labels >= 0]
    batches = SameClass(partners)(known, 8, seed=5)
    groups = np.array(list(batches)).reshape(-1, 1 + partners)
    assert (
        len(batches) == 20 // (8 // (1 + partners))
        and (known[groups] == known[groups[:, :1]]).all()
    )
    anchors = groups[:, 0]
    assert len(np.unique(anchors)) == len(anchors) == len(batches) * 8 // (1 + partners)
    for group in groups:
        others = (known == known[group[0]]).sum() - 1
        if others == 0:
            assert (group == group[0]).all()  # alone in its class
        elif others >= partners:
            assert len(set(group)) == 1 + partners
        else:
            assert group[0] not in group[1:]


def test_partners_are_drawn_evenly():
    counts = np.zeros((6, 6))
    batches = SameClass(2)(np.array([0, 1, 0, 0, 1, 0]), 3, seed=0)
    for epoch in range(600):
        batches.set_epoch(epoch)
        for anchor, *others in batches:
            np.add.at(counts, (anchor, others), 1)
    same = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0]])[[0, 1, 0, 0, 1, 0]] * (1 - np.eye(6))
    assert ((counts > 0) == (same > 0)).all()
    four = counts[np.ix_([0, 2, 3, 5], [0, 2, 3, 5])]
    assert (
        np.abs(four[~np.eye(4, dtype=bool)] - 400).max() < 60
    )  # 2 of 3 others; five standard deviations
    assert counts[1, 4] == counts[4, 1] == 1200  # the only other, twice


@pytest.mark.parametrize("sampling", [Mixed(0.25), SameClass(3)], ids=repr)
def test_order_depends_on_seed_and_epoch_alone(labels, sampling):
    given = labels if isinstance(sampling, Mixed) else labels[labels >= 0]

    def order(seed, epoch):
        batches = sampling(given, 8, seed)
        batches.set_epoch(epoch)
        return list(batches)

    batches = sampling(given, 8, 1)
    assert list(batches) == list(batches) == order(1, 0)
    torch.manual_seed(9)
    np.random.seed(9)
    assert (
        order(1, 0) == list(batches)
        and len({str(order(s, e)) for s in (1, 2) for e in (0, 1, 2)}) == 6
    )


# --------------------------------------------------------------------------------------------------
# through the loader
def loaders(small, sampling, **options):
    """In memory, row by row from HF, and from a torch data set whose labels only reading tells."""
    x, y = pixels(small["train"])
    untold = Untold(x, y.tolist())
    labelled = {"labelled": 60} if isinstance(sampling, Mixed) else {}
    base = {"validation": "none", **labelled, **options}
    return [
        kd.load(small, **base),
        kd.load(small, transforms=v2.PILToTensor(), num_workers=0, **base),
        kd.load(
            Subset(untold, range(300)),
            TensorDataset(*pixels(small["test"])),
            num_workers=0,
            num_classes=10,
            **base,
        ),
    ]


@pytest.mark.parametrize("sampling", [Mixed(0.25), SameClass(3)], ids=repr)
def test_every_kind_of_data_gives_the_same_rows(small, sampling):
    found = []
    for data in loaders(small, sampling):
        loader = data.train.loader(32, sampling=sampling, seed=4)
        made = list(loader)
        assert len(made) == len(loader)
        for batch in made:
            y = batch["y"]
            assert len(y) == 32 and batch["x"].shape == (32, 3, 16, 16)
            if isinstance(sampling, Mixed):
                assert int((y >= 0).sum()) == 8
            else:
                assert (y.view(8, 4) == y[::4, None]).all()
        found.append(([b["index"].tolist() for b in made], [b["y"].tolist() for b in made]))
    assert found[0] == found[1] == found[2]


def test_a_row_that_is_drawn_again_is_augmented_anew(small):
    data, each, _ = loaders(small, SameClass(3))
    each = kd.load(
        small,
        validation="none",
        transforms=v2.Compose([v2.PILToTensor(), v2.RandomCrop(12)]),
        num_workers=0,
    )
    for kind in (data, each):
        seen: dict[int, list] = {}
        for batch in kind.train.loader(32, sampling=SameClass(3)):
            finished = kind.prepare_batch(batch, epoch=0, train=True)
            assert set(finished) == {"x", "y", "index"}
            for row, x in zip(finished["index"].tolist(), finished["x"], strict=True):
                seen.setdefault(row, []).append(x)
        several = [xs for xs in seen.values() if len(xs) >= 4]
        distinct = [len({x.numpy().tobytes() for x in xs}) / len(xs) for xs in several]
        assert len(several) > 100 and np.mean(distinct) > 0.8
        first = {r: xs[0] for r, xs in seen.items()}
        plain = next(iter(kind.train.loader(300)))
        assert "draw" not in plain
        evenly = kind.prepare_batch(plain, epoch=0, train=True)["x"]
        assert all(
            torch.equal(evenly[r], x) for r, x in first.items()
        )  # the first draw is that of any other loader
    views = data.prepare_batch(
        next(iter(data.train.loader(32, sampling=SameClass(3)))), epoch=0, train=True, views=2
    )
    assert views["views"].shape == (32, 2, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampling", [Mixed(0.25), SameClass(3)], ids=repr)
def test_prepared_loader_follows_the_epoch_and_resumes(small, sampling, workers):
    config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    data = loaders(small, sampling)[1 if workers else 0]
    data.train.num_workers = workers
    loader = accelerator.prepare(data.train.loader(32, sampling=sampling, seed=2))
    orders = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        orders.append(rows_of(loader))
    assert orders[0] != orders[1] == orders[2] and len(orders[0]) == len(loader)
    fresh = accelerator.prepare(
        loaders(small, sampling)[0].train.loader(32, sampling=sampling, seed=2)
    )
    fresh.set_epoch(1)  # another process, which resumes in the middle of that epoch
    for skipped in (3, len(loader) - 1):
        assert rows_of(accelerator.skip_first_batches(fresh, skipped)) == orders[1][skipped:]
    fresh.set_epoch(2)
    loader.set_epoch(2)
    assert rows_of(fresh) == rows_of(loader) != orders[1]


@pytest.mark.parametrize("sampling", [Mixed(0.25), SameClass(3), OwnBatches(2)], ids=repr)
def test_ranks_share_every_batch(small, sampling):
    data = loaders(small, sampling)[0]
    truth = data.train.loader(32, sampling=sampling, seed=2)
    parts = []
    for rank in range(2):
        own = data.train.loader(32, sampling=sampling, seed=2)
        part = prepare_data_loader(
            own, torch.device("cpu"), 2, rank, split_batches=True, put_on_device=True
        )
        part.set_epoch(1)
        parts.append(list(part))
    truth.batch_sampler.sampler.set_epoch(1)
    both = [torch.cat([a["index"], b["index"]]).tolist() for a, b in zip(*parts, strict=True)]
    assert both == rows_of(truth)
    for batch in parts[0] + parts[1]:
        if isinstance(sampling, Mixed):
            assert int((batch["y"] >= 0).sum()) == 4
        elif isinstance(sampling, OwnBatches):
            assert len(batch["y"]) == 32  # half of two batches; image i is network i % 2's
        else:
            assert (batch["y"].view(4, 4) == batch["y"][::4, None]).all()


@pytest.mark.parametrize("networks", [1, 2, 3])
def test_own_batches_run_through_the_rows_in_an_order_for_each_network(networks):
    labels = np.zeros(20, np.int64)
    batches = OwnBatches(networks)(labels, 6, seed=5)
    first = np.array(list(batches)).reshape(3, 6, networks)  # 2 of 20 rows do not fill a batch
    orders = first.reshape(18, networks)
    assert len(batches) == 3 and all(len(set(order)) == 18 for order in orders.T)
    assert len({tuple(order) for order in orders.T}) == networks
    again = OwnBatches(networks)(labels, 6, seed=5)
    assert np.array_equal(np.array(list(again)).reshape(first.shape), first)
    batches.set_epoch(1)
    assert not np.array_equal(np.array(list(batches)).reshape(first.shape), first)


def test_own_batches_of_a_loader(small):
    data = kd.load(small, validation="none", seed=0)
    read = list(data.train.loader(8, sampling=OwnBatches(2), seed=3))
    assert len(read) == 300 // 8 and {len(batch["x"]) for batch in read} == {16}
    counts = torch.cat([batch["index"] for batch in read]).bincount()
    assert counts.max() == 2  # once for each network, and the second time with its own changes
    assert sum(int(b["draw"].sum()) for b in read if "draw" in b) == int((counts == 2).sum())
    with pytest.raises(ValueError, match="do not fill one batch"):
        data.train.loader(400, sampling=OwnBatches(2))
    with pytest.raises(ValueError, match="networks of OwnBatches"):
        OwnBatches(0)


# ------------------------------------------------------------------------------------------- cross-
# entropy of the peers
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_peers_with_rows_without_a_label(small, smoothing):
    net = timm.create_model("cifar_resnet8", num_classes=10).eval()
    data = kd.load(small, validation="none", labelled=60)
    batch = data.prepare_batch(
        next(iter(data.train.loader(64, sampling=Mixed(0.25)))), epoch=0, train=True
    )
    plain, semi = (Peers([net], label_smoothing=smoothing, unlabelled=u) for u in (False, True))
    assert semi.uses_unlabelled and not plain.uses_unlabelled
    step = semi(batch, Clock())
    known = batch["y"] >= 0
    z = step.logits["student"]
    want = functional.ce(z[known], batch["y"][known], label_smoothing=smoothing) * known.sum() / 64
    torch.testing.assert_close(step.losses["ce"], want)
    if not smoothing:
        torch.testing.assert_close(step.losses["ce"], paper_totals.mean_teacher(z, z, batch["y"]))
    batch["y"] = torch.arange(64) % 10
    torch.testing.assert_close(
        semi(batch, Clock()).losses["ce"], plain(batch, Clock()).losses["ce"]
    )
