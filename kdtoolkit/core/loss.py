"""DistillationLoss: one loss between the outputs of a student and a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, Shape, TapKey


class DistillationLoss(nn.Module):
    """One paper's loss between two outputs: `objective(student, teacher, batch) -> unweighted scalar`.

    A subclass gets `(student: Taps, teacher: Frozen, pairs)` and its options by keyword, builds everything from their
    shapes, and leaves in `self.pairs` the (student tap, teacher tap) pairs that it reads. `needs_teacher` is False for
    losses on labels alone, `needs_taps` for losses on logits alone.
    """

    needs_teacher = True
    needs_taps = True

    def __init__(
        self, student: Taps, teacher: Frozen | None, pairs: Sequence[tuple[TapKey, TapKey]] = ()
    ):
        super().__init__()
        if self.needs_taps and not pairs:
            raise ValueError(
                f"{type(self).__name__} compares features: give pairs of taps, [(student tap, teacher tap)]"
            )
        self.pairs = [(student.key(s), t if teacher is None else teacher.key(t)) for s, t in pairs]

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        raise NotImplementedError

    def features(self, student: Out, teacher: Out) -> tuple[list[Tensor], list[Tensor]]:
        """The paired features, students' and teachers'."""
        return [student.feats[s] for s, _ in self.pairs], [teacher.feats[t] for _, t in self.pairs]

    def plan_rows(self) -> list[dict[str, Any]]:
        """Rows for the plan: student tap, teacher tap, what stands between them."""
        adapters = getattr(self, "adapters", None)
        rows = []
        for i, (s, t) in enumerate(self.pairs):
            adapter = adapters[i] if adapters is not None and i < len(adapters) else None
            rows.append({"student": s, "teacher": t, "adapter": adapter})
        return rows


def shapes_of(taps: Taps, keys: Sequence[TapKey]) -> list[Shape]:
    """Shapes of taps before any hook is placed."""
    return [taps.end(k).shape for k in keys]


def zero_loss(part: nn.Module, logits: Tensor) -> Tensor:
    """Zero that hangs on the parameters of a part that is switched off: DDP expects their gradient."""
    zero = logits.float().sum() * 0.0
    return sum((p.float().sum() * 0.0 for p in part.parameters()), zero)
