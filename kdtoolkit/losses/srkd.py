"""Stage reset knowledge distillation, SRKD (Chen & Sun 2024, Modeling and Simulation).

Loss: sum over stages i of mean((M_i(F_i^S) - S_i^T(A_i(F_{i-1}^S)))^2). The student's stage i is
compared with the teacher's own stage i, run on the student's output of the stage before. Stage 1
starts from the image for both, so its target is the ordinary feature of the teacher, shared with
the plain pass. Total: CE + KD + 0.1 * SRKD.

Differs: the paper does not say whether gradients flow through the teacher's stage into the
student's earlier stages: detached by default, `detach=False` lets them flow. Eq. 7 has an adapter M
behind every stage of both networks, which `adapters="always", sides="both"` builds; trained on both
sides they can shrink together, so that the default has them on the student's side, in the shape of
the teacher's feature. Eq. 1 is, to the letter, a two-sided cross-entropy (y log p + (1 - y) log(1 -
p), summed over classes); "ce" is the ordinary one, as in the paper's text and in its baselines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, is_pair_of_taps, shapes_of
from kdtoolkit.core.plan import ComparedTaps
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, TapKey
from kdtoolkit.utils.validation import check_choice, check_flag, describe_value, plain_scalar


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
            with the ordinary feature of the teacher; () is the paper's M-FitNet. A list with 1
            resets the first stage too: the teacher's runs on the student's stem (the paper's Table
            4, row 3).
        detach: True: the target is a constant, and only the adapter in front of the teacher's
            stage learns from it. False: gradients flow through the frozen stage into earlier
            stages of the student.
        resize: How the adapters resize: "pool" or "interpolate".
        adapters: Where M_i has a 1x1 convolution: "auto" (where channels differ) or "always".
        sides: Networks that have adapters M_i: "student" or "both".
        stem: (student tap, teacher tap) at the end of the stems, which nothing is compared at; read
            where the first stage is reset. Default: what enters the first stage of each.

    Attributes:
        adapters: M_i of the student, one for each pair.
        target_adapters: M_i of the teacher, one for each pair; empty unless `sides` is "both".
        inputs: A_i by number of the pair, one for each tensor that leaves the teacher's stage
            i - 1.

    Raises:
        ValueError: If there are too few pairs, they are not in order, the teacher cannot be reset
            at a tap, because some of what follows reads something else, or the first stage is to be
            reset and a network has no stem that can be found.
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
        adapters: str = "auto",
        sides: str = "student",
        stem: tuple[TapKey, TapKey] | None = None,
    ) -> None:
        super().__init__(student, teacher, pairs)
        check_flag("detach", detach)
        check_choice("adapters", adapters, ("auto", "always"))
        check_choice("sides", sides, ("student", "both"))
        if len(self.pairs) < 2:
            raise ValueError(
                f"stage reset needs at least two pairs of stages, got {self.pairs}: "
                "give layers=[(s, t), ...]"
            )
        self.reset = _reset_numbers(reset, len(self.pairs))
        if stem is not None and 1 not in self.reset:
            raise ValueError(
                f"stem={describe_value(stem)} has no effect: it is read where reset has the first "
                "stage; leave it out, or pass reset=[1, ...]"
            )
        self.detach = detach
        self.teacher = teacher
        self.stem = self._resolve_stem(student, stem) if 1 in self.reset else None
        student_keys, teacher_keys = [s for s, _ in self.read_taps], [t for _, t in self.read_taps]
        self._check_order(student, student_keys)
        self._check_order(teacher, teacher_keys)
        self._check_resets()
        src = shapes_of(student, [s for s, _ in self.pairs])
        dst = shapes_of(teacher, [t for _, t in self.pairs])
        always = adapters == "always"
        self.adapters = nn.ModuleList(
            Adapter(s, t, resize=resize, always=always) for s, t in zip(src, dst, strict=True)
        )
        self.target_adapters = nn.ModuleList(
            Adapter(t, t, always=always) for t in dst if sides == "both"
        )
        self.inputs = nn.ModuleDict()
        for i in self.reset:
            before, key = self._before(i)
            shape = student.boundary_of(before).shape
            self.inputs[str(i)] = nn.ModuleList(
                Adapter(shape, part.shape, resize=resize)
                for part in teacher.boundary_of(key).read_tensors
            )

    @property
    def read_taps(self) -> list[tuple[TapKey, TapKey]]:
        """The pairs, and the stems where the first stage is reset."""
        return self.pairs if self.stem is None else [self.stem, *self.pairs]

    def _before(self, i: int) -> tuple[TapKey, TapKey]:
        """Taps of student and teacher in front of their stages of pair i, counted from 1."""
        if i > 1:
            return self.pairs[i - 2]
        assert self.stem is not None
        return self.stem

    def _resolve_stem(
        self, student: Taps, given: tuple[TapKey, TapKey] | None
    ) -> tuple[TapKey, TapKey]:
        if given is not None:
            if not is_pair_of_taps(given):
                raise ValueError(
                    f"stem is {describe_value(given)}; allowed: (student tap, teacher tap), such "
                    "as ('act1', 'act1')"
                )
            return student.resolve_key(given[0]), self.teacher.resolve_key(given[1])
        found: list[TapKey] = []
        for name, taps in (("student", student), ("teacher", self.teacher)):
            stem = taps.find_stem()
            if stem is None:
                raise ValueError(
                    f"reset has the first stage, and what enters that of the {name} "
                    f"({type(taps.model).__name__}) was not found: name the modules that end the "
                    "stems, stem=(student tap, teacher tap), or leave 1 out of reset"
                )
            found.append(stem.name)
        return found[0], found[1]

    def _check_order(self, taps: Taps, keys: Sequence[TapKey]) -> None:
        depths = [taps.boundary_of(key).returned_at for key in keys]
        if depths != sorted(set(depths)):
            raise ValueError(
                "stage reset needs pairs from shallow to deep, each tap once, got "
                f"{self.read_taps}: sort layers=[(s, t), ...]"
            )

    def _check_resets(self) -> None:
        keys = [self._before(i)[1] for i in self.reset]
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
            reset_targets = self._reset_targets(student, batch)
            keys = [t for _, t in self.pairs]
            targets = [
                reset_targets.get(key, plain) for key, plain in zip(keys, targets, strict=True)
            ]
        if self.target_adapters:
            targets = [adapter(f) for adapter, f in zip(self.target_adapters, targets, strict=True)]
        adapted = [adapter(f) for adapter, f in zip(self.adapters, students, strict=True)]
        return functional.srkd(adapted, targets) + _zero_of_parameters(self.inputs, adapted[0])

    def _reset_targets(self, student: Out, batch: Batch) -> dict[TapKey, Tensor]:
        """Features of the teacher's stages that ran on the student's previous features."""
        replace: dict[TapKey, list[Tensor]] = {}
        for i in self.reset:
            before, key = self._before(i)
            feature = student.feats[before]
            previous = feature.detach() if self.detach else feature
            replace[key] = [adapter(previous) for adapter in self._inputs_of(i)]
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
    """Numbers of the pairs that are reset; "all" leaves the first, which starts from the image."""
    if isinstance(reset, str) and reset == "all":
        return list(range(2, count + 1))
    numbers = [plain_scalar(i) for i in reset] if isinstance(reset, (list, tuple)) else [None]
    found = [i for i in numbers if type(i) is int and 1 <= i <= count]
    if len(found) < len(numbers):
        raise ValueError(
            f"reset is {describe_value(reset)}; allowed: 'all' or a list of stage pairs from 1 to "
            f"{count}"
        )
    return sorted(set(found))
