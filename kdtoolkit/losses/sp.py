"""Similarity-preserving distillation (Tung & Mori 2019, arXiv 1907.09682).

Loss     ||G_t - G_s||_F^2 / B^2, G = the row-normalised Gram matrix of the flattened features; weight 3000
Differs  the last stage only, as in Tian et al. 2020 (the paper: after each stage, `stages="all"`)
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


@register_loss(
    "sp",
    losses={"ce": 1.0, "sp": 3000.0},
    title="Similarity-preserving distillation (Tung & Mori 2019)",
)
class SP(DistillationLoss):
    """Similarities between the samples of a batch; no parameters. `sp_stages` is "last" or "all"."""

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        sp_stages: str = "last",
    ):
        if sp_stages not in ("last", "all"):
            raise ValueError(f"sp_stages is {sp_stages!r}, allowed are 'last' and 'all'")
        super().__init__(student, teacher, pairs if sp_stages == "all" else list(pairs)[-1:])

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        return functional.sp(*self.features(student, teacher))
