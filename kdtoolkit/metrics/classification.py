"""Accuracy, agreement, calibration error and cross-entropy, as counts that add up over batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.metrics.counting import Counting


class Top1(Counting):
    """Share of samples whose highest logit is the label's, in percent. References: class ids (B,)."""

    key = "top1"
    k = 1

    def counts(self, logits: Tensor, references: Tensor) -> Tensor:
        ids = _ids(self.key, references)
        best = logits.topk(min(self.k, logits.shape[1]), dim=1).indices  # (N, k)
        return _pair(ids, (best == ids[:, None]).sum())

    def result(self, counts: list[float]) -> dict[str, Any]:
        return {self.key: 100 * counts[1] / counts[0]}


class Top5(Top1):
    """Share of samples whose label is among the min(5, C) highest logits, in percent. References: class ids (B,)."""

    key = "top5"
    k = 5


class Agreement(Top1):
    """Share of samples on which student and teacher choose the same class, in percent.

    predictions: student's logits (B, C); references: teacher's logits (B, C) or class ids (B,).
    """

    key = "agreement"
    against = "teacher"

    def counts(self, logits: Tensor, references: Tensor) -> Tensor:
        return super().counts(logits, references.argmax(1) if references.ndim == 2 else references)


class CrossEntropy(Counting):
    """Mean cross-entropy, in nats. References: class ids (B,)."""

    key = "loss"

    def counts(self, logits: Tensor, references: Tensor) -> Tensor:
        ids = _ids(self.key, references)
        return _pair(ids, F.cross_entropy(logits, ids.long(), reduction="none").double().sum())

    def result(self, counts: list[float]) -> dict[str, Any]:
        return {self.key: counts[1] / counts[0]}


class ECE(Counting):
    """Expected calibration error over 15 bins of equal width, in percent (Guo et al. 2017, arXiv 1706.04599).

    A sample's confidence is its highest probability; bin m holds confidences in ((m - 1) / 15, m / 15].
    ECE = sum over bins of |accuracy - mean confidence| * (samples in the bin / all samples).
    References: class ids (B,).
    """

    key = "ece"
    bins = 15
    width = 1 + 3 * bins  # N, then per bin: samples, right ones, sum of confidences

    def counts(self, logits: Tensor, references: Tensor) -> Tensor:
        ids = _ids(self.key, references)
        confidence, best = logits.softmax(1).max(1)  # (N,)
        place = (confidence * self.bins).ceil().clamp(1, self.bins) - 1
        member = place[:, None] == torch.arange(self.bins, device=logits.device)  # (N, bins)
        facts = torch.stack(
            [torch.ones_like(confidence), (best == ids).to(confidence.dtype), confidence]
        ).double()
        return torch.cat([_number(ids)[None], (facts @ member.double()).flatten()])

    def result(self, counts: list[float]) -> dict[str, Any]:
        samples, right, confidence = (torch.tensor(counts[1:], dtype=torch.float64)).view(
            3, self.bins
        )
        if samples.sum() < counts[0]:  # confidences that are not a number fall in no bin
            return {self.key: float("nan")}
        return {self.key: 100 * (right - confidence).abs().sum().item() / counts[0]}


def _ids(key: str, references: Tensor) -> Tensor:
    if references.ndim != 1 or references.is_floating_point():
        raise ValueError(
            f"{key} got references of shape {tuple(references.shape)} and type {references.dtype}; "
            "expected integer class ids (B,)"
        )
    return references


def _number(ids: Tensor) -> Tensor:
    return torch.full((), ids.numel(), dtype=torch.float64, device=ids.device)


def _pair(ids: Tensor, total: Tensor) -> Tensor:
    return torch.stack([_number(ids), total.double()])
