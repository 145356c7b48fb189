"""Similarity-preserving distillation (Tung & Mori 2019, arXiv 1907.09682).

Loss     ||G_t - G_s||_F^2 / B^2, G = the row-normalised Gram matrix of the flattened features; weight 3000
Differs  the last stage only, as in Tian et al. 2020 (the paper: after each stage, `stages="all"`)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import functional
from ..method import Objective, objective
from ..taps import Frozen, Taps
from ..types import Batch, Out, Stage


@objective("sp", losses={"ce": 1.0, "sp": 3000.0}, title="Similarity-preserving distillation (Tung & Mori 2019)")
class SP(Objective):
    """Similarities between the samples of a batch; no parameters. `sp_stages` is "last" or "all"."""

    def __init__(
        self, student: Taps, teacher: Frozen, pairs: Sequence[tuple[Stage, Stage]] = (), *, sp_stages: str = "last"
    ):
        if sp_stages not in ("last", "all"):
            raise ValueError(f"sp_stages is {sp_stages!r}, allowed are 'last' and 'all'")
        super().__init__(student, teacher, pairs if sp_stages == "all" else list(pairs)[-1:])

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        return functional.sp(*self.features(student, teacher))
