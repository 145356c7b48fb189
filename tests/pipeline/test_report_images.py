"""Images of the Grad-CAM figure: spread over the classes, some of them wrong."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtoolkit import data
from kdtoolkit.pipeline.report_images import SHOWN, choose_images, pick, spread

CLASSES = {
    "few classes": ([0] * 100 + [1] * 100, 2),
    "as many as are shown": (sorted(list(range(8)) * 20), 8),
    "many classes": (sorted(list(range(50)) * 6), 8),
    "one rare class": ([0] * 300 + [1] * 2 + [2] * 300, 3),
    "a single class": ([0] * 50, 1),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("num_wrong", [0, 1, 3, 20])
def test_images_are_of_as_many_classes_as_fit_and_up_to_three_are_wrong(name, num_wrong):
    labels, num_classes = CLASSES[name]
    predicted = list(labels)
    for row in np.linspace(0, len(labels) - 1, num_wrong).astype(int).tolist():
        predicted[row] = labels[row] + 1
    rows = pick(labels, predicted)
    assert len(rows) == len(set(rows)) == SHOWN
    assert [labels[row] for row in rows] == sorted(labels[row] for row in rows)
    assert len({labels[row] for row in rows}) == num_classes
    assert sum(predicted[row] != labels[row] for row in rows) == min(num_wrong, 3)


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "shown_wrong"),
    [(0, 10, 8), (2, 10, 6), (5, 10, 3), (3, 2, 2), (0, 0, 0)],
)
def test_few_images_are_all_shown(num_right, num_wrong, shown_wrong):
    labels = [row % 4 for row in range(num_right + num_wrong)]
    predicted = labels[:num_right] + [label + 1 for label in labels[num_right:]]
    rows = pick(labels, predicted)
    assert len(rows) == min(SHOWN, len(labels))
    assert sum(row >= num_right for row in rows) == shown_wrong


def test_a_student_that_always_says_one_class_is_shown_over_the_classes():
    labels = [row % 10 for row in range(200)]
    rows = pick(labels, [4] * 200)
    assert len({labels[row] for row in rows}) == SHOWN and 4 in {labels[row] for row in rows}


def test_a_class_is_taken_twice_only_when_all_are_taken_once():
    labels = [0, 0, 0, 0, 1, 1, 2]
    assert spread(range(7), labels, 3) == [0, 4, 6]
    assert sorted(spread(range(7), labels, 5)) == [0, 1, 4, 5, 6]
    assert spread(range(7), labels, 2, [0]) == [4, 6]
    assert spread(range(7), labels, 4, [0]) == [4, 6, 1, 5]
    assert spread(range(7), labels, 4, [0], only_new=True) == [4, 6]
    assert len(spread(range(7), labels, 99)) == 7


class ByBrightness(nn.Module):
    """Predicts the class of `images`, but says 0 for every twentieth."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        value = (x.mean((1, 2, 3)) * 255).round()
        level = (value / 10).floor().clamp(0, self.num_classes - 1)
        level = torch.where(value % 10 == 9, (level + 1) % self.num_classes, level)
        return nn.functional.one_hot(level.long(), self.num_classes) * self.scale


NUM_CLASSES, PER_CLASS = 6, 30


def brightness():
    """Sorted by class, as a folder of classes is; a class is its brightness in tens."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    values = 10 * labels + torch.arange(len(labels)) % 10
    x = values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return x, labels


def in_memory():
    x, labels = brightness()
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=NUM_CLASSES)
    )
    rows = {"image": images, "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


class Unlabelled:
    """A torch data set that does not say its labels before it is read."""

    def __init__(self):
        self.x, self.labels_ = brightness()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], int(self.labels_[row])


SOURCES = {
    "in memory": in_memory,
    "row by row": lambda: TensorDataset(*brightness()),
    "labels known by reading": Unlabelled,
    "a DataLoader": lambda: DataLoader(TensorDataset(*brightness()), 16),
    "a stream": lambda: in_memory().to_iterable_dataset(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_that_is_sorted_by_class_shows_all_classes_and_errors(source):
    make = SOURCES[source]
    options = {} if source in ("a DataLoader", "a stream") else {"num_workers": 0}
    loaded = data.load(
        make(), make(), validation="none", num_classes=NUM_CLASSES, transforms="none", **options
    )
    torch.manual_seed(0)
    state = torch.get_rng_state()
    net = ByBrightness(NUM_CLASSES).train()
    found = choose_images(loaded, loaded.test, net)
    assert found.images.shape == (SHOWN, 3, 8, 8) and found.images.is_floating_point()
    assert len(found.labels.unique()) == NUM_CLASSES
    predicted = net(found.images).argmax(1)
    assert (predicted != found.labels).sum() == 3
    assert "of 180 images of the test split" in found.note and "3 of the 18" in found.note
    assert net.training and torch.equal(state, torch.get_rng_state())
