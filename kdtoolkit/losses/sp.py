"""Similarity-preserving distillation, SP (Tung & Mori 2019, arXiv 1907.09682).

Loss: ||G_t - G_s||_F^2 / B^2, where G is the row-normalised Gram matrix (B, B) of the flattened
features; default weight 3000.

Differs: the last stage only, as in Tian et al. 2020. The paper compares after each stage:
`sp_stages="all"`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, check_pairs
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, TapKey
from kdtoolkit.utils.validation import check_choice


@register_loss(
    "sp",
    losses={"ce": 1.0, "sp": 3000.0},
    title="Similarity-preserving distillation (Tung & Mori 2019)",
)
class SP(DistillationLoss):
    """Similarity-preserving: compare similarities between the samples of a batch; no parameters.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: (student tap, teacher tap) of every pair of features.
        sp_stages: Which of the pairs are compared: "last" or "all".
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        sp_stages: str = "last",
    ) -> None:
        check_choice("sp_stages", sp_stages, ("last", "all"))
        check_pairs("SP", pairs)
        super().__init__(student, teacher, pairs if sp_stages == "all" else list(pairs)[-1:])

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        return functional.sp(*self.features(student, teacher))
