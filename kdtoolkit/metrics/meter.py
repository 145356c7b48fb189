"""Several metrics at once."""

from __future__ import annotations

from collections.abc import Iterable

from numpy.typing import ArrayLike
from torch import Tensor

from kdtoolkit.metrics.counting import CountingMetric, compute_all, raise_no_samples


class Meter:
    """Several metrics, updated together and added over ranks in one collective call.

    Args:
        metrics: The metrics, all with `sync=True` or all with `sync=False`.

    Raises:
        ValueError: If there are none, or `sync` differs.

    Example:
        >>> meter = Meter([Top1(), CrossEntropy()])
        >>> meter.add(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        >>> meter.compute()
        {'top1': 100.0, 'loss': 0.6931471824645996}
    """

    def __init__(self, metrics: Iterable[CountingMetric]) -> None:
        self.metrics = list(metrics)
        if not self.metrics:
            raise ValueError("Meter got no metrics; pass at least one, such as [Top1()]")
        if len({metric.sync for metric in self.metrics}) > 1:
            raise ValueError(
                "Meter got metrics with sync=True and with sync=False; make them all alike"
            )

    def add(
        self,
        predictions: ArrayLike | Tensor,
        references: ArrayLike | Tensor,
        teacher: ArrayLike | Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predictions: Logits, (B, C).
            references: Labels, (B,).
            teacher: The teacher's logits (B, C) or class ids (B,); None leaves `Agreement` out.
        """
        for metric in self.metrics:
            targets = teacher if metric.compares_with == "teacher" else references
            if targets is not None:
                metric.add_batch(predictions=predictions, references=targets)

    def compute(self) -> dict[str, float]:
        """Return the named numbers of all metrics over all batches and ranks, and clear the counts.

        Returns:
            Numbers by name; without those of a metric that no rank has given a sample.

        Raises:
            ValueError: If no sample was added on any rank.
        """
        found = [numbers for numbers in compute_all(self.metrics) if numbers is not None]
        if not found:
            raise_no_samples(", ".join(metric.key for metric in self.metrics))
        return {key: value for numbers in found for key, value in numbers.items()}
