"""Stage reset knowledge distillation, SRKD (Chen & Sun 2024, Modeling and Simulation).

Loss     sum over stages i of mean((M_i(F_i^S) - S_i^T(A_i(F_{i-1}^S)))^2): the teacher's own stage i, run on the
         student's output of the stage before, is what the student's stage i is compared with. Stage 1 starts from the
         image for both, so its target is the teacher's ordinary feature, shared with the plain pass.
         Total: CE + KD + 0.1 * SRKD
Differs  the paper does not say whether gradients flow through the teacher's stage into the student's earlier stages:
         detached by default, `detach=False` lets them flow. Its adapters M on the teacher's side are left out: trained
         on both sides they could shrink together; the student's goes to the teacher's shape
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, shapes_of
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.reset_check import find_reset_leaks
from kdtoolkit.types import Batch, Out, TapKey


@register_loss(
    "srkd",
    losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1},
    title="Stage reset distillation (Chen & Sun 2024)",
)
class SRKD(DistillationLoss):
    """Stage reset over pairs of stages.

    reset   which pairs are reset, counted from 1: "all" (from the second on; the first starts from the image), or a
            list, for instance (3,) for the last of three; the others are compared with the teacher's ordinary feature.
            () is the paper's M-FitNet
    detach  True: the target is a constant, only the adapter in front of the teacher's stage learns from it. False:
            gradients flow through the frozen stage into the student's earlier stages
    resize  of the adapters: "pool" or "interpolate"
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        reset: str | Sequence[int] = "all",
        detach: bool = True,
        resize: str = "pool",
    ):
        super().__init__(student, teacher, pairs)
        if len(self.pairs) < 2:
            raise ValueError(
                f"stage reset needs at least two pairs of stages, got {self.pairs}: give layers=[(s, t), ...]"
            )
        self.reset = _numbers(reset, len(self.pairs))
        self.detach = detach
        self.teacher = teacher
        for taps, keys in zip((student, teacher), zip(*self.pairs, strict=True), strict=True):
            depths = [taps.end(k).left for k in keys]
            if depths != sorted(set(depths)):
                raise ValueError(
                    f"stage reset needs pairs from shallow to deep, each tap once, got {self.pairs}"
                )
        resets = [self.pairs[i - 2][1] for i in self.reset]
        for key in resets:
            teacher.check_cut(key)
        wrong = find_reset_leaks(teacher, resets)
        if wrong:
            raise ValueError(
                f"the teacher cannot be reset at {resets}: {'; '.join(wrong)}; choose other layers=[...]"
            )
        src, dst = (
            shapes_of(student, [s for s, _ in pairs]),
            shapes_of(teacher, [t for _, t in pairs]),
        )
        self.adapters = nn.ModuleList(
            Adapter(s, t, resize=resize) for s, t in zip(src, dst, strict=True)
        )  # M_i
        ends = {str(i): teacher.end(self.pairs[i - 2][1]).boundary for i in self.reset}
        self.inputs = nn.ModuleDict(  # A_i, one for each tensor that leaves the teacher's stage
            {
                i: nn.ModuleList(Adapter(src[int(i) - 2], p.shape, resize=resize) for p in parts)
                for i, parts in ends.items()
            }
        )

    def plan_rows(self) -> list[dict[str, Any]]:
        rows = super().plan_rows()
        for i in self.reset:
            rows[i - 1]["entry"] = self.inputs[str(i)]
        return rows

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        students, targets = self.features(student, teacher)
        replace: dict[TapKey, list[Tensor]] = {}
        for i in self.reset:
            previous = students[i - 2].detach() if self.detach else students[i - 2]
            replace[self.pairs[i - 2][1]] = [a(previous) for a in self.inputs[str(i)]]  # type: ignore[attr-defined]
        if replace:
            outputs = self.teacher.reset(
                batch["x"], replace, [self.pairs[i - 1][1] for i in self.reset]
            )
            targets = [
                outputs.get(t, target) for (_, t), target in zip(self.pairs, targets, strict=True)
            ]
        adapted = [adapter(f) for adapter, f in zip(self.adapters, students, strict=True)]
        return functional.srkd(adapted, targets) + _nothing(self.inputs, adapted[0])


def _nothing(inputs: nn.Module, like: Tensor) -> Tensor:
    """Zero that hangs on every A_i: one whose tensor goes past the teacher's next stage, straight to its head
    (EfficientViM), has no other gradient, and DDP expects one."""
    return sum(
        (p.float().sum() * 0.0 for p in inputs.parameters()),
        like.new_zeros((), dtype=torch.float32),
    )


def _numbers(reset: str | Sequence[int], count: int) -> list[int]:
    if reset == "all":
        return list(range(2, count + 1))
    if not isinstance(reset, (list, tuple)) or any(
        not isinstance(i, int) or not 1 <= i <= count for i in reset
    ):
        raise ValueError(f"reset={reset!r}: 'all' or a list of stage pairs from 1 to {count}")
    return sorted({i for i in reset if i > 1})  # the first stage starts from the image for both
