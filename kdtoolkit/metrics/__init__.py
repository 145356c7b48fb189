"""Numbers: accuracy, agreement, calibration and loss that add up over ranks, and what a network costs.

Each metric is an `evaluate.Metric` that works offline and keeps a few counts instead of all predictions.

    meter = Meter([Top1(), Top5(), CrossEntropy(), ECE(), Agreement()])
    meter.add(student_logits, labels, teacher=teacher_logits)      # per batch
    meter.compute()                                                # {"top1": 91.2, "top5": 99.5, "loss": ..., ...}
"""

from __future__ import annotations

from kdtoolkit.metrics.classification import ECE, Agreement, CrossEntropy, Top1, Top5
from kdtoolkit.metrics.compress import CompressionScore, compression, summary
from kdtoolkit.metrics.cost import Cost, cost, costs
from kdtoolkit.metrics.counting import Counting, Meter

__all__ = [
    "ECE",
    "Agreement",
    "CompressionScore",
    "Cost",
    "Counting",
    "CrossEntropy",
    "Meter",
    "Top1",
    "Top5",
    "compression",
    "cost",
    "costs",
    "summary",
]
