"""Cross-entropy with the labels: the loss of plain training, and a part of most methods.

Loss     mean over the batch of -log softmax(z_s)[y]
Differs  nothing
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, TapKey


@register_loss("ce")
class CrossEntropy(DistillationLoss):
    """Cross-entropy of logits (B, C) with labels (B,)."""

    needs_teacher = False
    needs_taps = False

    def __init__(
        self,
        student: Taps,
        teacher: Frozen | None = None,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        label_smoothing: float = 0.0,
    ):
        super().__init__(student, teacher)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 1)")
        self.label_smoothing = label_smoothing

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        return functional.ce(student.logits, batch["y"], label_smoothing=self.label_smoothing)
