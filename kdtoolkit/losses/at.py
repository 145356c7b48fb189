"""Attention transfer (Zagoruyko & Komodakis 2017, arXiv 1612.03928).

Loss     sum over taps of mean((a(f_s) - a(f_t))^2), a(f) = channel mean of f^2, flattened, unit length; weight 1000
Differs  grids of different size are average-pooled to the smaller one (the authors use equal sizes); the squared norm
         and the mean over positions as in the authors' code, not the paper's unsquared norm; an odd p keeps signs
         (the paper: |f|^p), which matters only for features that can be negative
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, shapes_of
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import as_map
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, TapKey


@register_loss(
    "at", losses={"ce": 1.0, "at": 1000.0}, title="Attention transfer (Zagoruyko & Komodakis 2017)"
)
class AT(DistillationLoss):
    """Attention maps of every pair of stages; no parameters. `p` is the power, at least 1."""

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        p: float = 2.0,
    ):
        super().__init__(student, teacher, pairs)
        if not p >= 1:  # below, the gradient at the zeros of a ReLU is infinite
            raise ValueError(f"p is {p}, the power of attention must be at least 1")
        self.p = p
        positions = [
            min(math.prod(student.end(s).shape.grid), math.prod(teacher.end(t).shape.grid))
            for s, t in self.pairs
        ]
        if max(positions) < 2:
            raise ValueError(
                f"attention transfer compares where a map is strong, and the maps of {self.pairs} have one position "
                "each: choose layers=[...] with larger maps, or larger images"
            )
        self.src = shapes_of(student, [s for s, _ in self.pairs])
        self.dst = shapes_of(teacher, [t for _, t in self.pairs])

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        students, teachers = self.features(student, teacher)
        students = [as_map(f, shape) for f, shape in zip(students, self.src, strict=True)]
        teachers = [as_map(f, shape) for f, shape in zip(teachers, self.dst, strict=True)]
        return functional.at(students, teachers, p=self.p)
