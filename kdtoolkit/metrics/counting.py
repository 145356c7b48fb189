"""Metrics as counts: what every metric here shares, and the Meter that updates several of them together.

A metric keeps one small float64 vector on the device of the predictions; its entry 0 is the number of samples.
Counts of batches and of ranks are added, so batches and ranks of unequal size give the number that one pass over all
data gives. Nothing is written to disk, nothing waits for the device before `compute()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

INPUTS = """
Args:
    predictions: logits (B, C), or (B, C, ...) with classes in dimension 1; tensor, numpy array or list
    references: what they are compared with, (B, ...); see the class
"""


class Counting(evaluate.Metric):
    """Base of the metrics: `counts` says what a batch adds, `result` turns the sums into numbers.

    sync  add the counts of all ranks in compute(), a collective call. False: this rank only.
    """

    key: str = ""  # name of the number in what compute() returns
    width: int = 2  # how many counts
    against: str = "labels"  # what Meter passes as references: "labels" | "teacher"
    _counts: Tensor | None
    _samples: int

    def __init__(self, sync: bool = True):
        super().__init__()
        self.sync = sync
        self._clear()

    def counts(self, logits: Tensor, references: Tensor) -> Tensor:
        """(N, C) logits and (N,) ids (or (N, C), where the class says so) -> (width,) float64, entry 0 = N."""
        raise NotImplementedError

    def result(self, counts: list[float]) -> dict[str, Any]:
        """The summed counts -> named numbers."""
        raise NotImplementedError

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch."""
        if kwargs:
            raise ValueError(
                f"{self.key}: unknown inputs {sorted(kwargs)}; allowed: predictions, references"
            )
        if predictions is None or references is None:
            raise ValueError(
                f"{self.key} needs both predictions and references; pass logits (B, C) and what to compare with"
            )
        logits, references = _rows(self.key, predictions, references)
        with torch.no_grad():
            counts = self.counts(logits, references)
            self._counts = (
                counts if self._counts is None else self._counts.to(counts.device) + counts
            )
        self._samples += len(logits)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample: logits (C,) and what they are compared with."""
        if prediction is None or reference is None:
            raise ValueError(
                f"{self.key} needs both prediction and reference, got {prediction!r} and {reference!r}"
            )
        self.add_batch(
            predictions=_tensor(prediction)[None], references=_tensor(reference)[None], **kwargs
        )

    def compute(
        self, *, predictions: Any = None, references: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Add the batch, if one is given, then return the named numbers over all batches and ranks, and start anew."""
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        return _finish([self])[0] or _nothing(self.key)

    def __len__(self) -> int:
        """Samples seen by this rank since the last compute()."""
        return self._samples

    def _clear(self) -> None:
        self._counts = None
        self._samples = 0

    def _build_data_dir(self) -> str:  # evaluate would make a cache folder
        return ""

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float32")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": [kind], "references": datasets.Value("int64")}
            ),
        )


class Meter:
    """Several metrics, updated together and added over ranks in one collective call."""

    def __init__(self, metrics: Iterable[Counting]):
        self.metrics = list(metrics)
        if not self.metrics:
            raise ValueError("Meter got no metrics; pass at least one, such as [Top1()]")
        if len({m.sync for m in self.metrics}) > 1:
            raise ValueError(
                "Meter got metrics with sync=True and with sync=False; make them all alike"
            )

    def add(self, predictions: Any, references: Any, teacher: Any = None) -> None:
        """Logits (B, C), labels (B,) and the teacher's logits or class ids. Without it, `Agreement` is left out."""
        for metric in self.metrics:
            against = teacher if metric.against == "teacher" else references
            if against is not None:
                metric.add_batch(predictions=predictions, references=against)

    def compute(self) -> dict[str, Any]:
        """Named numbers of all metrics over all batches and ranks; starts anew."""
        found = _finish(self.metrics)
        if not any(found):
            _nothing(", ".join(m.key for m in self.metrics))
        return {key: value for numbers in found if numbers for key, value in numbers.items()}


def _finish(metrics: list[Counting]) -> list[dict[str, Any] | None]:
    """Sum over ranks, clear, and turn into numbers; None for a metric that no rank has given a sample."""
    zeros = torch.zeros((), dtype=torch.float64)
    parts = [zeros.new_zeros(m.width) if m._counts is None else m._counts for m in metrics]
    device = next((p.device for p in parts if p.device.type != "cpu"), zeros.device)
    counts = torch.cat([p.to(device) for p in parts])
    if metrics[0].sync and dist.is_available() and dist.is_initialized():
        if dist.get_backend() == "nccl":
            counts = counts.to(
                torch.device("cuda", torch.cuda.current_device())
            )  # ranks without a batch have CPU zeros
        counts = counts.clone()  # counts made in inference mode must not be written in place
        dist.all_reduce(counts)
    sums = counts.cpu().split([m.width for m in metrics])
    for metric in metrics:
        metric._clear()
    return [m.result(s.tolist()) if s[0] > 0 else None for m, s in zip(metrics, sums, strict=True)]


def _nothing(names: str) -> dict[str, Any]:
    raise ValueError(
        f"{names}: compute() before any sample was added, on any rank; "
        "call add_batch first, or check that the data is not empty"
    )


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))


def _rows(key: str, predictions: Any, references: Any) -> tuple[Tensor, Tensor]:
    """Any input -> logits (N, C) and references (N,) or (N, C) on the logits' device, classes last."""
    logits, references = _tensor(predictions), _tensor(references)
    fits = logits.ndim >= 2 and references.shape in (
        logits.shape,
        logits.shape[:1] + logits.shape[2:],
    )
    if not fits:
        raise ValueError(
            f"{key} got predictions of shape {tuple(logits.shape)} and references of shape {tuple(references.shape)}; "
            "expected logits (B, C) with references (B,): pass the network's logits, not class ids"
        )
    if references.ndim == logits.ndim:
        references = references.movedim(1, -1).reshape(-1, logits.shape[1])
    else:
        references = references.reshape(-1)
    logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits, references.to(logits.device)
