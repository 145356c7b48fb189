"""What draws the rows of a user's DataLoader is part of a checkpoint."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kdtoolkit import data as kd
from kdtoolkit import distill
from kdtoolkit.core.callback import Callback
from kdtoolkit.data.sampler_state import SamplerState, describe_inexact
from kdtoolkit.utils.signals import Interrupted
from kdtoolkit.utils.state_tree import PackedState, pack_state, unpack_state

N, BATCH = 24, 4
X = torch.arange(N, dtype=torch.float32)[:, None, None, None].expand(N, 3, 8, 8) / N
Y = torch.arange(N) % 2
WEIGHTS = torch.arange(1, N + 1) / N
ROWS = TensorDataset(X.contiguous(), Y)


def torch_generator():
    return torch.Generator().manual_seed(7)


class Own(Sampler):
    """Draws with a generator of its own, of any library."""

    def __init__(self, generator):
        self.rng = generator

    def __len__(self):
        return N

    def __iter__(self):
        order = list(range(N))
        self.rng.shuffle(order)
        return iter(order)


class Counting(Sampler):
    """Another order each time, by a number that it counts."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return N

    def __iter__(self):
        self.passes += 1
        return iter(np.random.default_rng(self.passes).permutation(N).tolist())


class Global(Sampler):
    """Draws from the global generators of NumPy and Python."""

    def __len__(self):
        return N

    def __iter__(self):
        order = np.random.permutation(N).tolist()
        random.shuffle(order)
        return iter(order)


class WithStates(Counting):
    """As torchdata's samplers."""

    def state_dict(self):
        return {"n": self.passes}

    def load_state_dict(self, state):
        self.passes = state["n"]


class OwnBatches(Sampler):
    def __init__(self):
        self.inner = {"rng": 0}
        self.source = Own(random.Random(3))

    def __len__(self):
        return N // BATCH

    def __iter__(self):
        return iter(list(map(list, zip(*[iter(self.source)] * BATCH, strict=True))))


class Stream(IterableDataset):
    def __init__(self):
        self.rng = np.random.default_rng(5)

    def __iter__(self):
        for row in self.rng.permutation(N):
            yield X[row], Y[row]


def of(sampler):
    return DataLoader(ROWS, BATCH, sampler=sampler)


LOADERS = {
    "weighted, own generator": lambda: of(
        WeightedRandomSampler(WEIGHTS, N, generator=torch_generator())
    ),
    "weighted, global generator": lambda: of(WeightedRandomSampler(WEIGHTS, N)),
    "shuffled, own generator": lambda: DataLoader(
        ROWS, BATCH, shuffle=True, generator=torch_generator()
    ),
    "drawn again": lambda: of(
        RandomSampler(ROWS, replacement=True, num_samples=N, generator=torch_generator())
    ),
    "subset": lambda: of(SubsetRandomSampler(list(range(N)), generator=torch_generator())),
    "batch sampler": lambda: DataLoader(
        ROWS,
        batch_sampler=BatchSampler(
            WeightedRandomSampler(WEIGHTS, N, generator=torch_generator()), BATCH, True
        ),
    ),
    "NumPy's generator": lambda: of(Own(np.random.default_rng(1))),
    "NumPy's older generator": lambda: of(Own(np.random.RandomState(1))),
    "Python's generator": lambda: of(Own(random.Random(1))),
    "a counter": lambda: of(Counting()),
    "a state_dict": lambda: of(WithStates()),
    "the global generators": lambda: of(Global()),
    "own batches": lambda: DataLoader(ROWS, batch_sampler=OwnBatches()),
    "a stream": Stream,
    "a stream in a loader": lambda: DataLoader(Stream(), BATCH),
}


def load(kind):
    return kd.load(LOADERS[kind](), num_classes=2, transforms="none")


def rows_of(batch):
    return (batch["x"][:, 0, 0, 0] * N).round().long().tolist()


def draw(data, count=None):
    """The rows of an epoch, or of its first batches."""
    return [rows_of(b) for b in itertools.islice(iter(data.train.loader(BATCH)), count)]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("in_epoch", [False, True])
def test_a_state_gives_the_same_rows(kind, in_epoch):
    data = load(kind)
    state = SamplerState(data.train)
    with_globals = "global" in kind
    if with_globals:
        np.random.seed(0), random.seed(0), torch.manual_seed(0)
    draw(data)
    state.start_epoch()
    if in_epoch:
        second = draw(data)
        saved = state.state_dict(in_epoch=True)
    else:
        saved = state.state_dict(in_epoch=False)
        second = draw(data)
    packed = pack_state(saved)  # as a checkpoint writes it
    saved = unpack_state(PackedState(json.loads(json.dumps(packed.plain)), packed.tensors))
    fresh = load(kind)
    if kind == "weighted, global generator":  # the trainer seeds it
        return
    again = SamplerState(fresh.train)
    again.load_state_dict(saved)
    assert draw(fresh) == second
    with again.preserved():
        draw(fresh, 2)
    third = draw(fresh)
    if not with_globals:
        assert third == draw(data) and third != second


def test_settings_are_no_state():
    """A number that never changes is an argument: a resumed run may give another."""

    class Scaled(Counting):
        factor = 2

        def __init__(self, share):
            super().__init__()
            self.share = share

    first, second = (kd.load(of(Scaled(share)), num_classes=2) for share in (0.5, 0.7))
    state = SamplerState(first.train)
    draw(first)
    saved = state.state_dict(in_epoch=False)
    SamplerState(second.train).load_state_dict(saved)
    sampler = second.train.user_loader.sampler
    assert (sampler.share, sampler.passes) == (0.7, 1)


class Kill(Callback):
    """Interrupts a run as Ctrl-C does, and writes down the rows of every batch."""

    def __init__(self, at=None):
        self.at, self.rows = at, {}

    def on_losses(self, run, step, batch):
        self.rows[run.clock.step] = rows_of(batch)
        if run.clock.step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", ["weighted, own generator", "the global generators", "a counter"])
def test_a_resumed_run_trains_on_the_same_rows(kind, tmp_path):
    def run(folder, at=None):
        watch = Kill(at)
        call = dict(
            student="cifar_resnet8", train_data=LOADERS[kind](), num_classes=2, method="none",
            transforms="none", epochs=3, output_dir=tmp_path / folder, resume="auto",
            report_to="none", progress="off", callbacks=[watch],
        )  # fmt: skip
        if at is None:
            return watch.rows, distill(**call).student.state_dict()
        with pytest.raises(Interrupted):
            distill(**call)
        return watch.rows, None

    whole, weights = run("whole")
    before, _ = run("cut", at=8)  # in the second epoch of six batches
    after, resumed = run("cut")
    assert before | after == whole and min(after) > 6
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


class Noisy(Dataset):
    def __init__(self, rng=None):
        self.rng = rng

    def __len__(self):
        return N

    def __getitem__(self, row):
        return X[row], Y[row]


@pytest.mark.parametrize(
    ("source", "notes"),
    [
        (DataLoader(ROWS, BATCH), []),
        (of(WeightedRandomSampler(WEIGHTS, N, generator=torch_generator())), []),
        (of(WithStates()), []),
        (of(Counting()), [r"DataLoader's Counting is no sampler of torch: a checkpoint holds"]),
        (DataLoader(ROWS, batch_sampler=OwnBatches()), [r"DataLoader's OwnBatches is no sampler"]),
        (DataLoader(Noisy(), BATCH), [r"resumed within an epoch gets the same rows, with other"]),
        (
            DataLoader(Noisy(np.random.default_rng(0)), BATCH),
            [r"random generator of its own \(data set\.rng\).* cannot be exact"],
        ),
        (DataLoader(Stream(), BATCH), []),
        (DataLoader(Stream(), BATCH, num_workers=1), [r"random generator of its own"]),
        (ROWS, []),
    ],
)
def test_what_cannot_be_resumed_exactly_is_said(source, notes):
    found = describe_inexact(kd.load(source, num_classes=2, transforms="none").train)
    assert len(found) == len(notes), found
    for note, pattern in zip(found, notes, strict=True):
        assert re.search(pattern, note)


def test_the_run_says_it_before_training(tmp_path):
    run = dict(
        student="cifar_resnet8", train_data=of(Counting()), method="none", max_steps=1,
        num_classes=2, transforms="none", dry_run=True,
    )  # fmt: skip
    said = "Counting is no sampler of torch"
    assert said in str(distill(**run, output_dir=tmp_path / "run").plan).replace("\n", " ")
    assert said not in str(distill(**run).plan)  # without a folder nothing is resumed
