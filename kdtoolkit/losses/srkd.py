"""Stage reset knowledge distillation, SRKD (Chen & Sun 2024, Modeling and Simulation).

Loss: sum over stages i of mean((M_i(F_i^S) - S_i^T(A_i(F_{i-1}^S)))^2). The student's stage i is
compared with the teacher's own stage i, run on the student's output of the stage before. Stage 1
starts from the image for both, so its target is the ordinary feature of the teacher, shared with
the plain pass. Total: CE + KD + 0.1 * SRKD.

Differs: the paper does not say whether gradients flow through the teacher's stage into the
student's earlier stages: detached by default, `detach=False` lets them flow. Its adapters M on the
teacher's side are left out: trained on both sides they could shrink together; the student's
feature goes to the shape of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, shapes_of
from kdtoolkit.core.plan import ComparedTaps
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, TapKey
from kdtoolkit.utils.validation import check_flag, describe_value, plain_scalar


@register_loss(
    "srkd",
    losses={"ce": 1.0, "kd": 1.0, "srkd": 0.1},
    title="Stage reset distillation (Chen & Sun 2024)",
)
class SRKD(DistillationLoss):
    """Stage reset: the teacher's stages run on features of the student, and are its targets.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: (student tap, teacher tap) of at least two stages, from shallow to deep.
        reset: Which pairs are reset, counted from 1: "all" (from the second on; the first starts
            from the image), or a list, such as (3,) for the last of three. The others are compared
            with the ordinary feature of the teacher; () is the paper's M-FitNet.
        detach: True: the target is a constant, and only the adapter in front of the teacher's
            stage learns from it. False: gradients flow through the frozen stage into earlier
            stages of the student.
        resize: How the adapters resize: "pool" or "interpolate".

    Attributes:
        adapters: M_i, one for each pair.
        inputs: A_i by number of the pair, one for each tensor that leaves the teacher's stage
            i - 1.

    Raises:
        ValueError: If there are too few pairs, they are not in order, or the teacher cannot be
            reset at a tap, because some of what follows reads something else.
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
    ) -> None:
        super().__init__(student, teacher, pairs)
        check_flag("detach", detach)
        if len(self.pairs) < 2:
            raise ValueError(
                f"stage reset needs at least two pairs of stages, got {self.pairs}: "
                "give layers=[(s, t), ...]"
            )
        self.reset = _reset_numbers(reset, len(self.pairs))
        self.detach = detach
        self.teacher = teacher
        student_keys, teacher_keys = [s for s, _ in self.pairs], [t for _, t in self.pairs]
        self._check_order(student, student_keys)
        self._check_order(teacher, teacher_keys)
        self._check_resets()
        src, dst = shapes_of(student, student_keys), shapes_of(teacher, teacher_keys)
        self.adapters = nn.ModuleList(
            Adapter(s, t, resize=resize) for s, t in zip(src, dst, strict=True)
        )
        self.inputs = nn.ModuleDict()
        for i in self.reset:
            boundary = teacher.boundary_of(self._key_before(i)).read_tensors
            self.inputs[str(i)] = nn.ModuleList(
                Adapter(src[i - 2], part.shape, resize=resize) for part in boundary
            )

    def _key_before(self, i: int) -> TapKey:
        """Tap of the teacher in front of its stage of pair i, counted from 1."""
        return self.pairs[i - 2][1]

    def _check_order(self, taps: Taps, keys: Sequence[TapKey]) -> None:
        depths = [taps.boundary_of(key).returned_at for key in keys]
        if depths != sorted(set(depths)):
            raise ValueError(
                "stage reset needs pairs from shallow to deep, each tap once, got "
                f"{self.pairs}: sort layers=[(s, t), ...]"
            )

    def _check_resets(self) -> None:
        keys = [self._key_before(i) for i in self.reset]
        for key in keys:
            self.teacher.check_replaceable(key)
        errors = self.teacher.find_reset_errors(keys)
        if errors:
            raise ValueError(
                f"the teacher cannot be reset at {keys}: {'; '.join(errors)}; "
                "choose other layers=[...]"
            )

    def plan_rows(self) -> list[ComparedTaps]:
        """As of every loss, with the adapters in front of the stages that are reset."""
        rows = super().plan_rows()
        for i in self.reset:
            rows[i - 1]["entry"] = self._inputs_of(i)
        return rows

    def _inputs_of(self, i: int) -> nn.ModuleList:
        adapters = self.inputs[str(i)]
        assert isinstance(adapters, nn.ModuleList)
        return adapters

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        students, targets = self.features(student, teacher)
        if self.reset:
            reset_targets = self._reset_targets(students, batch)
            keys = [t for _, t in self.pairs]
            targets = [
                reset_targets.get(key, plain) for key, plain in zip(keys, targets, strict=True)
            ]
        adapted = [adapter(f) for adapter, f in zip(self.adapters, students, strict=True)]
        return functional.srkd(adapted, targets) + _zero_of_parameters(self.inputs, adapted[0])

    def _reset_targets(self, students: Sequence[Tensor], batch: Batch) -> dict[TapKey, Tensor]:
        """Features of the teacher's stages that ran on the student's previous features."""
        replace: dict[TapKey, list[Tensor]] = {}
        for i in self.reset:
            previous = students[i - 2].detach() if self.detach else students[i - 2]
            replace[self._key_before(i)] = [adapter(previous) for adapter in self._inputs_of(i)]
        wanted = [self.pairs[i - 1][1] for i in self.reset]
        return self.teacher.reset(batch["x"], replace, wanted)


def _zero_of_parameters(inputs: nn.Module, like: Tensor) -> Tensor:
    """Zero that depends on every A_i, because DDP expects a gradient for each.

    One whose tensor passes the teacher's next stage and goes straight to its head (EfficientViM)
    has no other gradient.
    """
    zero = like.new_zeros((), dtype=torch.float32)
    return sum((p.float().sum() * 0.0 for p in inputs.parameters()), zero)


def _reset_numbers(reset: str | Sequence[int], count: int) -> list[int]:
    """Numbers of the pairs that are reset; the first never is, both sides start from the image."""
    if isinstance(reset, str) and reset == "all":
        return list(range(2, count + 1))
    numbers = [plain_scalar(i) for i in reset] if isinstance(reset, (list, tuple)) else [None]
    found = [i for i in numbers if type(i) is int and 1 <= i <= count]
    if len(found) < len(numbers):
        raise ValueError(
            f"reset is {describe_value(reset)}; allowed: 'all' or a list of stage pairs from 1 to "
            f"{count}"
        )
    return sorted({i for i in found if i > 1})
