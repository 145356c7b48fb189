"""Metrics as counts: what every metric here shares.

A metric keeps one small float64 vector on the device of the predictions; its entry 0 is the number
of samples. Counts of batches and of ranks are added, so batches and ranks of unequal size give the
number that one pass over all data gives. Nothing is written to disk, and nothing waits for the
device before `compute()`.
"""

from __future__ import annotations

from typing import Literal, NoReturn

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike
from torch import Tensor

INPUTS = """
Args:
    predictions: logits (B, C), or (B, C, ...) with classes in dimension 1; tensor, array or list
    references: what they are compared with, (B, ...); see the class
"""


class CountingMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Base of the metrics: `count` says what a batch adds, `result` turns the sums into numbers.

    Args:
        sync: Add the counts of all ranks in `compute()`, a collective call. False: this rank only.

    Attributes:
        key: Name of the number that `compute()` returns.
        num_counts: Length of the vector of counts.
        compares_with: What `Meter` passes as references: the labels or the teacher's predictions.

    Example:
        >>> Top1().compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[1, 1])
        {'top1': 50.0}
    """

    key: str = ""
    num_counts: int = 2
    compares_with: Literal["labels", "teacher"] = "labels"
    _counts: Tensor | None
    _num_samples: int

    def __init__(self, sync: bool = True) -> None:
        super().__init__()
        self.sync = sync
        self._clear()

    def count(self, logits: Tensor, references: Tensor) -> Tensor:
        """Count what a batch adds.

        Args:
            logits: (N, C) float.
            references: Class ids (N,), or (N, C) where the class says so.

        Returns:
            (num_counts,) float64, of which entry 0 is N.
        """
        raise NotImplementedError

    def result(self, counts: list[float]) -> dict[str, float]:
        """Turn the summed counts into named numbers.

        Args:
            counts: Sums over batches and ranks, `num_counts` of them.

        Returns:
            Numbers by name.
        """
        raise NotImplementedError

    def add_batch(
        self,
        *,
        predictions: ArrayLike | Tensor | None = None,
        references: ArrayLike | Tensor | None = None,
        **kwargs: object,
    ) -> None:
        """Add a batch.

        Args:
            predictions: Logits (B, C), or (B, C, ...) with classes in dimension 1.
            references: What they are compared with, (B, ...).
            kwargs: None are allowed; `evaluate.Metric` has them.

        Raises:
            ValueError: If one is missing or the shapes do not fit.
        """
        if kwargs:
            raise ValueError(
                f"{self.key}: unknown inputs {sorted(kwargs)}; allowed: predictions, references"
            )
        if predictions is None or references is None:
            raise ValueError(
                f"{self.key} needs both predictions and references; "
                "pass logits (B, C) and what to compare with"
            )
        logits, targets = _flatten_batch(self.key, predictions, references)
        with torch.no_grad():
            counts = self.count(logits, targets)
            if self._counts is not None:
                counts = self._counts.to(counts.device) + counts
        self._counts = counts
        self._num_samples += len(logits)

    def add(
        self,
        *,
        prediction: ArrayLike | Tensor | None = None,
        reference: ArrayLike | Tensor | None = None,
        **kwargs: object,
    ) -> None:
        """Add one sample.

        Args:
            prediction: Logits (C,).
            reference: What they are compared with.
            kwargs: None are allowed; `evaluate.Metric` has them.

        Raises:
            ValueError: If one is missing.
        """
        if prediction is None or reference is None:
            raise ValueError(
                f"{self.key} needs both prediction and reference, "
                f"got {prediction!r} and {reference!r}; pass both"
            )
        self.add_batch(
            predictions=_to_tensor(prediction)[None],
            references=_to_tensor(reference)[None],
            **kwargs,
        )

    def compute(
        self,
        *,
        predictions: ArrayLike | Tensor | None = None,
        references: ArrayLike | Tensor | None = None,
        **kwargs: object,
    ) -> dict[str, float]:
        """Return the named numbers over all batches and ranks, and clear the counts.

        Args:
            predictions: Logits of a batch to add first, or None.
            references: What they are compared with, or None.
            kwargs: None are allowed; `evaluate.Metric` has them.

        Returns:
            Numbers by name.

        Raises:
            ValueError: If no sample was added on any rank.
        """
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        numbers = compute_all([self])[0]
        return raise_no_samples(self.key) if numbers is None else numbers

    def __len__(self) -> int:
        return self._num_samples  # of this rank, since the last compute()

    def _clear(self) -> None:
        self._counts = None
        self._num_samples = 0

    def _build_data_dir(self) -> str:  # evaluate would make a cache folder
        return ""

    def _info(self) -> evaluate.MetricInfo:
        logit = datasets.Value("float32")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": [logit], "references": datasets.Value("int64")}
            ),
        )


def compute_all(metrics: list[CountingMetric]) -> list[dict[str, float] | None]:
    """Sum the counts over ranks, clear them, and turn them into numbers.

    Args:
        metrics: The metrics, whose counts are added in one collective call.

    Returns:
        Numbers by name for each metric; None for one that no rank has given a sample.
    """
    zeros = torch.zeros((), dtype=torch.float64)
    parts = [
        zeros.new_zeros(metric.num_counts) if metric._counts is None else metric._counts
        for metric in metrics
    ]
    device = next((part.device for part in parts if part.device.type != "cpu"), zeros.device)
    counts = torch.cat([part.to(device) for part in parts])
    if metrics[0].sync and dist.is_available() and dist.is_initialized():
        counts = _sum_over_ranks(counts)
    sums = torch.split(counts.cpu(), [metric.num_counts for metric in metrics])
    for metric in metrics:
        metric._clear()
    return [
        metric.result(total.tolist()) if total[0] > 0 else None
        for metric, total in zip(metrics, sums, strict=True)
    ]


def _sum_over_ranks(counts: Tensor) -> Tensor:
    if dist.get_backend() == "nccl":  # ranks without a batch have zeros on the CPU
        counts = counts.to(torch.device("cuda", torch.cuda.current_device()))
    counts = counts.clone()  # counts made in inference mode must not be written in place
    dist.all_reduce(counts)
    return counts


def raise_no_samples(names: str) -> NoReturn:
    """Raise the `ValueError` that no sample was added.

    Args:
        names: Names of the metrics, as the message shows them.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{names}: compute() before any sample was added, on any rank; "
        "call add_batch first, or check that the data is not empty"
    )


def _to_tensor(values: ArrayLike | Tensor) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _flatten_batch(
    key: str, predictions: ArrayLike | Tensor, references: ArrayLike | Tensor
) -> tuple[Tensor, Tensor]:
    """Any input as logits (N, C) and references (N,) or (N, C) on the logits' device."""
    logits, targets = _to_tensor(predictions), _to_tensor(references)
    without_classes = logits.shape[:1] + logits.shape[2:]
    if logits.ndim < 2 or targets.shape not in (logits.shape, without_classes):
        raise ValueError(
            f"{key} got predictions of shape {tuple(logits.shape)} and references of shape "
            f"{tuple(targets.shape)}; expected logits (B, C) with references (B,): "
            "pass the network's logits, not class ids"
        )
    if targets.ndim == logits.ndim:
        targets = targets.movedim(1, -1).reshape(-1, logits.shape[1])
    else:
        targets = targets.reshape(-1)
    logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits, targets.to(logits.device)
