"""Whether the top-1 accuracy of a network is more than chance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdtoolkit.metrics.counting import CountingMetric

SIGNIFICANCE = 0.05
SMALLEST_GAIN = 0.05  # of the way from chance to 100 %: less is near chance, however many images
USEFUL_GAIN = 0.25  # a network that goes this far of the way is near chance with at most 5 %


class ChanceLevel(NamedTuple):
    """What answers reach that do not depend on the image.

    Attributes:
        images: Number of images.
        top1: Expected accuracy, percent: the sum over classes of its share of the labels times its
            share of the answers.
    """

    images: int
    top1: float


class Chance(CountingMetric):
    """The accuracy that a network's answers would have if they did not depend on the image.

    Predictions are logits (B, C), references class ids (B,); see `CountingMetric`.

    Args:
        num_classes: C.
        sync: As in `CountingMetric`.
    """

    key = "chance"

    def __init__(self, num_classes: int, sync: bool = True) -> None:
        super().__init__(sync)
        self.num_classes = num_classes
        self.num_counts = 1 + 2 * num_classes

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count the samples, the labels and the answers of each class, (1 + 2 C,)."""
        labels = torch.bincount(references.long(), minlength=self.num_classes)
        answers = torch.bincount(logits.argmax(1), minlength=self.num_classes)
        number = torch.full((1,), len(references), device=labels.device)
        return torch.cat([number, labels, answers]).double()

    def result(self, counts: list[float]) -> dict[str, float]:
        """Return the expected accuracy in percent, and the number of images."""
        number, labels, answers = counts[0], counts[1 : 1 + self.num_classes], counts[1:]
        answers = answers[self.num_classes :]
        expected = sum(p * q for p, q in zip(labels, answers, strict=True)) / number**2
        return {self.key: 100 * expected, "images": number}


def is_near_chance(top1: float, chance: ChanceLevel) -> bool:
    """Tell whether an accuracy says that a network is no better than chance.

    Two conditions must hold, each a binomial test at 5 %. The accuracy is not above chance, or by
    less than `SMALLEST_GAIN`. And it is too low for a network that goes `USEFUL_GAIN` of the way
    from chance to 100 %, so that few images are no reason to suspect a good network.

    Args:
        top1: Accuracy, percent.
        chance: What answers reach that do not depend on the image.

    Returns:
        True for a network that is near chance.
    """
    expected, images = chance.top1 / 100, chance.images
    correct = round(top1 / 100 * images)
    gain = top1 / 100 - expected
    above = 1 - _share_below(correct, images, expected)
    is_small = above > SIGNIFICANCE or gain < SMALLEST_GAIN * (1 - expected)
    useful = expected + USEFUL_GAIN * (1 - expected)
    return is_small and _share_below(correct + 1, images, useful) <= SIGNIFICANCE


def _share_below(count: int, trials: int, probability: float) -> float:
    """P(X < count) of a binomial distribution."""
    if probability <= 0 or probability >= 1:
        return float(count > (0 if probability <= 0 else trials))
    log_p, log_q = math.log(probability), math.log1p(-probability)
    whole = math.lgamma(trials + 1)
    return min(1.0, math.fsum(
        math.exp(
            whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * log_p + (trials - k) * log_q
        )
        for k in range(count)
    ))  # fmt: skip
