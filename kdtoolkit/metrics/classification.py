"""Accuracy, agreement, calibration error and cross-entropy, as counts that add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.metrics.counting import CountingMetric


class Top1(CountingMetric):
    """Top-1 accuracy: samples whose highest logit is that of the label, in percent.

    Predictions are logits (B, C), references class ids (B,); see `CountingMetric`.
    """

    key = "top1"
    k = 1

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count the samples and the correct ones, (2,)."""
        ids = _check_class_ids(self.key, references)
        best = logits.topk(min(self.k, logits.shape[1]), dim=1).indices  # (N, k)
        return _number_and_sum(ids, (best == ids[:, None]).sum())

    def result(self, counts: list[float]) -> dict[str, float]:
        """Return the accuracy in percent."""
        return {self.key: 100 * counts[1] / counts[0]}


class Top5(Top1):
    """Top-5 accuracy: samples whose label is among the min(5, C) highest logits, in percent.

    Predictions are logits (B, C), references class ids (B,); see `CountingMetric`.
    """

    key = "top5"
    k = 5


class Agreement(Top1):
    """Samples for which student and teacher predict the same class, in percent.

    Predictions are the student's logits (B, C), references the teacher's logits (B, C) or class
    ids (B,); see `CountingMetric`.
    """

    key = "agreement"
    compares_with = "teacher"

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count the samples and those that agree, (2,)."""
        return super().count(logits, references.argmax(1) if references.ndim == 2 else references)


class CrossEntropy(CountingMetric):
    """Mean cross-entropy, in nats.

    Predictions are logits (B, C), references class ids (B,); see `CountingMetric`.
    """

    key = "loss"

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count the samples and sum their cross-entropy, (2,)."""
        ids = _check_class_ids(self.key, references)
        losses = F.cross_entropy(logits, ids.long(), reduction="none")  # (N,)
        return _number_and_sum(ids, losses.double().sum())

    def result(self, counts: list[float]) -> dict[str, float]:
        """Return the mean in nats."""
        return {self.key: counts[1] / counts[0]}


class ECE(CountingMetric):
    """Expected calibration error over 15 bins of equal width, in percent.

    A sample's confidence is its highest probability; bin m holds confidences in
    ((m - 1) / 15, m / 15]. With n samples in all and |B_m| in bin m,

        ECE = sum_m |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|

    (Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, eq. 3). It is
    NaN where a confidence is. Predictions are logits (B, C), references class ids (B,); see
    `CountingMetric`.
    """

    key = "ece"
    num_bins = 15
    num_counts = 1 + 3 * num_bins  # N, then for each bin: samples, correct ones, sum of confidences

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count the samples, and for each bin samples, correct ones and confidences, (46,)."""
        ids = _check_class_ids(self.key, references)
        confidence, best = logits.softmax(1).max(1)  # (N,)
        bin_of = (confidence * self.num_bins).ceil().clamp(1, self.num_bins) - 1
        in_bin = bin_of[:, None] == torch.arange(self.num_bins, device=logits.device)  # (N, bins)
        correct = (best == ids).to(confidence.dtype)
        values = torch.stack([torch.ones_like(confidence), correct, confidence]).double()  # (3, N)
        return torch.cat([_number(ids)[None], (values @ in_bin.double()).flatten()])

    def result(self, counts: list[float]) -> dict[str, float]:
        """Return the error in percent."""
        per_bin = torch.tensor(counts[1:], dtype=torch.float64).view(3, self.num_bins)
        samples, correct, confidence = per_bin
        if samples.sum() < counts[0]:  # confidences that are NaN are in no bin
            return {self.key: float("nan")}
        return {self.key: 100 * (correct - confidence).abs().sum().item() / counts[0]}


def _check_class_ids(key: str, references: Tensor) -> Tensor:
    if references.ndim != 1 or references.is_floating_point():
        raise ValueError(
            f"{key} got references of shape {tuple(references.shape)} and type {references.dtype}; "
            "expected integer class ids (B,)"
        )
    return references


def _number(ids: Tensor) -> Tensor:
    return torch.full((), ids.numel(), dtype=torch.float64, device=ids.device)


def _number_and_sum(ids: Tensor, total: Tensor) -> Tensor:
    return torch.stack([_number(ids), total.double()])
