"""Knowledge distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531), regression of logits.

Loss: T^2 KL(softmax(z_t / T) || softmax(z_s / T)), summed over classes, mean over the batch; T = 4.
"logits" (Ba & Caruana 2014, arXiv 1312.6184): mean squared difference of the logits.

Differs: nothing. The default weights, 0.1 cross-entropy + 0.9 KD, are those of Tian et al. 2020.
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
from kdtoolkit.utils.validation import check_temperature


@register_loss(
    "kd", losses={"ce": 0.1, "kd": 0.9}, title="Knowledge distillation (Hinton et al. 2015)"
)
class KD(DistillationLoss):
    """Knowledge distillation: the softened probabilities of the teacher are targets.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: Not used.
        temperature: Softens both probabilities; above 0, no unit.
    """

    needs_taps = False

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(student, teacher)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        return functional.kd(student.logits, teacher.logits, temperature=self.temperature)


@register_loss(
    "logits", losses={"ce": 1.0, "logits": 0.1}, title="Regression of logits (Ba & Caruana 2014)"
)
class Logits(DistillationLoss):
    """Regression of logits: their mean squared difference.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: Not used.
    """

    needs_taps = False

    def __init__(
        self, student: Taps, teacher: Frozen, pairs: Sequence[tuple[TapKey, TapKey]] = ()
    ) -> None:
        super().__init__(student, teacher)

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        return functional.logits_mse(student.logits, teacher.logits)
