"""Chance: its expected accuracy against permutations, and when an accuracy is near it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdtoolkit.metrics.chance import Chance, ChanceLevel, _share_below, is_near_chance


def measure(labels, answers, classes: int, batch: int = 7) -> tuple[float, ChanceLevel]:
    """Top-1 and chance level of answers."""
    labels, answers = torch.as_tensor(labels), torch.as_tensor(answers)
    metric = Chance(classes)
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        logits = torch.nn.functional.one_hot(answers[part], classes).float()
        metric.add_batch(predictions=logits, references=labels[part])
    row = metric.compute()
    top1 = 100 * (labels == answers).double().mean().item()
    return top1, ChanceLevel(int(row["images"]), row["chance"])


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_accuracy_is_that_of_shuffled_answers(seed):
    random = np.random.default_rng(seed)
    labels, answers = random.integers(0, 4, 300), random.choice(4, 300, p=(0.6, 0.2, 0.2, 0))
    _, chance = measure(labels, answers, 4)
    shuffled = [100 * np.mean(labels == random.permutation(answers)) for _ in range(2000)]
    assert chance.images == 300
    assert abs(chance.top1 - np.mean(shuffled)) < 4 * np.std(shuffled) / math.sqrt(2000)


def test_the_binomial_tail():
    for trials, p in ((1, 0.3), (7, 0.5), (40, 0.1)):
        terms = [math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(trials + 1)]
        for count in range(trials + 2):
            assert _share_below(count, trials, p) == pytest.approx(sum(terms[:count]))
    assert _share_below(0, 5, 0.0) == 0 and _share_below(1, 5, 0.0) == 1
    assert _share_below(5, 5, 1.0) == 0 and _share_below(6, 5, 1.0) == 1
    assert 0.49 < _share_below(25_000, 50_000, 0.5) < 0.5


# (images, classes, top-1 in percent, chance in percent, near chance)
CASES = [
    (10_000, 10, 10.47, 10.0, True),  # ResNet-20 weights in a ResNet-32
    (10_000, 10, 10.0, 10.0, True),
    (10_000, 10, 12.0, 10.0, True),  # significant, and still no teacher
    (10_000, 10, 9.0, 10.0, True),
    (10_000, 10, 0.0, 10.0, True),  # classes in another order
    (10_000, 10, 16.0, 10.0, False),
    (10_000, 10, 95.0, 10.0, False),
    (10_000, 100, 1.1, 1.0, True),
    (10_000, 100, 20.0, 1.0, False),
    (10_000, 100, 7.0, 1.0, False),
    (200, 100, 20.0, 1.0, False),
    (50, 100, 20.0, 1.0, False),
    (50_000, 1000, 0.1, 0.1, True),
    (50_000, 1000, 10.0, 0.1, False),
    (500, 10, 10.2, 10.0, True),
    (100, 10, 9.0, 10.0, True),
    (32, 10, 9.4, 10.0, True),
    (32, 10, 40.6, 10.0, False),
    (10, 10, 40.0, 10.0, False),
    (10, 10, 20.0, 10.0, False),  # too few images to say
    (4, 2, 100.0, 50.0, False),
    (2, 2, 50.0, 50.0, False),
    (2, 2, 0.0, 50.0, False),
    (1, 10, 0.0, 0.0, False),
    (5, 2, 80.0, 80.0, False),  # a right teacher that meets one class
    (1000, 1, 100.0, 100.0, False),
    (1000, 2, 98.8, 98.0, False),  # rare class: above chance although below 99 % of one class
    (1000, 2, 50.0, 50.0, True),
    (1000, 2, 90.0, 90.0, True),
    (1000, 2, 60.0, 50.0, False),
]


@pytest.mark.parametrize(("images", "classes", "top1", "chance", "near"), CASES)
def test_when_an_accuracy_is_near_chance(images, classes, top1, chance, near):
    assert is_near_chance(top1, ChanceLevel(images, chance)) == near


@pytest.mark.parametrize("classes", [2, 5, 10, 100])
@pytest.mark.parametrize("images", [5, 20, 64, 500, 5000])
def test_how_often_right_and_random_teachers_are_stopped(classes, images):
    """One that knows 40 % of the images is hardly ever stopped; a random one at 500 images is."""
    random, runs = np.random.default_rng(classes + images), 60
    stopped = {"good": 0, "random": 0, "constant": 0}
    for _ in range(runs):
        labels = random.integers(0, classes, images)
        guesses = random.integers(0, classes, images)
        knows = random.random(images) < 0.4
        answers = {
            "good": np.where(knows, labels, guesses),
            "random": guesses,
            "constant": np.zeros(images, int),
        }
        for kind, given in answers.items():
            stopped[kind] += is_near_chance(*measure(labels, given, classes, 1000))
    assert stopped["good"] <= 1
    if images >= 500:
        assert stopped["random"] >= 0.9 * runs and stopped["constant"] == runs


def test_a_useful_teacher_of_unequal_classes_is_above_chance():
    labels = np.array([0] * 9900 + [1] * 100)
    answers = labels.copy()
    answers[:100], answers[-30:] = 1, 0  # 98.7 %, below the 99 % of always answering 0
    top1, chance = measure(labels, answers, 2)
    assert top1 < 99 and not is_near_chance(top1, chance)
    assert is_near_chance(*measure(labels, np.zeros(10_000, int), 2))
