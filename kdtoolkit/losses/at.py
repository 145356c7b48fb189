"""Attention transfer, AT (Zagoruyko & Komodakis 2017, arXiv 1612.03928).

Loss: sum over taps of mean((a(f_s) - a(f_t))^2), where a(f) is the channel mean of f^2, flattened
and scaled to unit length; default weight 1000. p="max": the maximum over channels of |f| in place
of the mean (F_max^1 of the paper).

Differs: grids of different size are average-pooled to the smaller one (the authors use equal
sizes). The norm is squared, and the mean is taken over positions, as in the authors' code; the
paper has an unsquared norm. An odd p keeps signs (the paper: |f|^p), which matters only for
features that can be negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, shapes_of
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.layout_conversion import as_map
from kdtoolkit.functional.features import check_attention_power
from kdtoolkit.types import Batch, Out, TapKey


@register_loss(
    "at", losses={"ce": 1.0, "at": 1000.0}, title="Attention transfer (Zagoruyko & Komodakis 2017)"
)
class AT(DistillationLoss):
    """Attention transfer: compare attention maps of every pair of stages; no parameters.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: (student tap, teacher tap) of every pair of features.
        p: Power of the attention, at least 1 (below, the gradient at the zeros of a ReLU is
            infinite), no unit; or "max", the paper's maximum over channels of |f|.

    Raises:
        ValueError: For another p, or if every map has a single position.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        p: float | str = 2.0,
    ) -> None:
        super().__init__(student, teacher, pairs)
        check_attention_power(p, minimum=1)
        self.p = p
        self.student_shapes = shapes_of(student, [s for s, _ in self.pairs])
        self.teacher_shapes = shapes_of(teacher, [t for _, t in self.pairs])
        num_positions = [
            min(math.prod(s.grid), math.prod(t.grid))
            for s, t in zip(self.student_shapes, self.teacher_shapes, strict=True)
        ]
        if max(num_positions) < 2:
            raise ValueError(
                "attention transfer compares where a map is strong, and the maps of "
                f"{self.pairs} have one position each: choose layers=[...] with larger maps, or "
                "larger images"
            )

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        students, teachers = self.features(student, teacher)
        student_maps = [as_map(f, s) for f, s in zip(students, self.student_shapes, strict=True)]
        teacher_maps = [as_map(f, s) for f, s in zip(teachers, self.teacher_shapes, strict=True)]
        return functional.at(student_maps, teacher_maps, p=self.p)
