"""Metrics: accuracy, agreement, calibration and loss that add up over ranks; the cost of networks.

Each metric is an `evaluate.Metric` that works offline and keeps a few counts in place of all
predictions.

Example:
    >>> from kdtoolkit.metrics import ECE, Agreement, CrossEntropy, Meter, Top1, Top5
    >>> meter = Meter([Top1(), Top5(), CrossEntropy(), ECE(), Agreement()])
    >>> for student_logits, teacher_logits, labels in batches:
    ...     meter.add(student_logits, labels, teacher=teacher_logits)
    >>> meter.compute()
    {'top1': 91.2, 'top5': 99.5, 'loss': 0.31, 'ece': 2.4, 'agreement': 93.0}
"""

from typing import TYPE_CHECKING

from kdtoolkit.utils.lazy_import import lazy_attributes

if TYPE_CHECKING:
    from kdtoolkit.metrics.classification import ECE as ECE
    from kdtoolkit.metrics.classification import Agreement as Agreement
    from kdtoolkit.metrics.classification import CrossEntropy as CrossEntropy
    from kdtoolkit.metrics.classification import Top1 as Top1
    from kdtoolkit.metrics.classification import Top5 as Top5
    from kdtoolkit.metrics.compression_score import CompressionScore as CompressionScore
    from kdtoolkit.metrics.compression_score import measure_compression as measure_compression
    from kdtoolkit.metrics.compression_score import score_compression as score_compression
    from kdtoolkit.metrics.counting import CountingMetric as CountingMetric
    from kdtoolkit.metrics.meter import Meter as Meter
    from kdtoolkit.metrics.model_cost import Cost as Cost
    from kdtoolkit.metrics.model_cost import measure_cost as measure_cost
    from kdtoolkit.metrics.model_cost import measure_costs as measure_costs

_PUBLIC = {
    "ECE": "kdtoolkit.metrics.classification",
    "Agreement": "kdtoolkit.metrics.classification",
    "CompressionScore": "kdtoolkit.metrics.compression_score",
    "Cost": "kdtoolkit.metrics.model_cost",
    "CountingMetric": "kdtoolkit.metrics.counting",
    "CrossEntropy": "kdtoolkit.metrics.classification",
    "Meter": "kdtoolkit.metrics.meter",
    "Top1": "kdtoolkit.metrics.classification",
    "Top5": "kdtoolkit.metrics.classification",
    "measure_compression": "kdtoolkit.metrics.compression_score",
    "measure_cost": "kdtoolkit.metrics.model_cost",
    "measure_costs": "kdtoolkit.metrics.model_cost",
    "score_compression": "kdtoolkit.metrics.compression_score",
}
_RENAMED = {  # of 0.1; they go with the next release
    "Counting": ("CountingMetric", "kdtoolkit.metrics.counting"),
    "compression": ("score_compression", "kdtoolkit.metrics.compression_score"),
    "cost": ("measure_cost", "kdtoolkit.metrics.model_cost"),
    "costs": ("measure_costs", "kdtoolkit.metrics.model_cost"),
    "summary": ("measure_compression", "kdtoolkit.metrics.compression_score"),
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC, _RENAMED)
