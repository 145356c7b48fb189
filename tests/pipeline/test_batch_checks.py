"""A batch of one image and BatchNorm over one value: found before training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from kdtoolkit import distill

ROWS = TensorDataset(torch.rand(17, 3, 16, 16), torch.arange(17) % 2)


def network(norm=True, pixels=1):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(pixels),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.Flatten(),
        nn.Linear(4 * pixels * pixels, 2),
    )


def vector_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def plan(student, data, **options):
    run = dict(method="none", transforms="none", num_workers=0, dry_run=True, max_steps=1)
    return distill(student=student, train_data=data, **run | options).plan


def own_batches(size, drop_last):
    return DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), size, drop_last))


LAST = r"the last batch of the DataLoader has one image \(17 rows in batches of 4\), and "
REFUSED = {
    "map of one pixel": (network, DataLoader(ROWS, 4), LAST + r"BatchNorm2d '2' of the student"),
    "vector": (vector_network, DataLoader(ROWS, 4), LAST + r"BatchNorm1d '2' of the student"),
    "batch sampler": (network, own_batches(4, False), LAST),
    "batches of one": (network, DataLoader(ROWS, 1), r"a batch has one image \(batch_size=1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case):
    student, data, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        plan(student(), data)


def test_batch_size_of_a_data_set():
    for options in (dict(batch_size=1), dict(batch_size=4, grad_accum=4)):
        with pytest.raises(ValueError, match=r"a batch has one image .*: pass a larger batch_size"):
            plan(network(), ROWS, **options)
    assert plan(network(), ROWS, batch_size=4, grad_accum=2)


ALLOWED = {
    "drop_last": (network, lambda: DataLoader(ROWS, 4, drop_last=True)),
    "another batch size": (network, lambda: DataLoader(ROWS, 5)),
    "batch sampler that drops": (network, lambda: own_batches(4, True)),
    "larger maps": (lambda: network(pixels=2), lambda: DataLoader(ROWS, 4)),
    "no BatchNorm": (lambda: network(norm=False), lambda: DataLoader(ROWS, 4)),
}


def test_a_frozen_norm_keeps_its_statistics():
    assert plan(network(), DataLoader(ROWS, 4), freeze=["2"])


@pytest.mark.parametrize("case", ALLOWED)
def test_what_trains_is_trained(case):
    student, data = ALLOWED[case]
    run = dict(method="none", transforms="none", epochs=1, progress="off", report_to="none")
    result = distill(student=student(), train_data=data(), num_workers=0, **run)
    assert result.metrics["epoch"] == 1
