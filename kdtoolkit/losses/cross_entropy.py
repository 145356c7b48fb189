"""Cross-entropy with the labels: the loss of plain training, and a part of most methods.

Loss: mean over the batch of -log softmax(z_s)[y].

Differs: nothing.
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
from kdtoolkit.utils.validation import check_number


@register_loss("ce")
class CrossEntropy(DistillationLoss):
    """Cross-entropy of logits (B, C) with labels (B,).

    Args:
        student: The tapped student.
        teacher: Not used.
        pairs: Not used.
        label_smoothing: Share of the target that is spread evenly over all classes, from 0 to
            below 1. No unit.
    """

    needs_teacher = False
    needs_taps = False

    def __init__(
        self,
        student: Taps,
        teacher: Frozen | None = None,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(student, teacher)
        check_number("label_smoothing", label_smoothing, minimum=0, below=1)
        self.label_smoothing = label_smoothing

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        return functional.ce(student.logits, batch["y"], label_smoothing=self.label_smoothing)
