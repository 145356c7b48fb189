"""Semi-online knowledge distillation, SOKD (Liu, Liu, Huang 2021, arXiv 2111.11747).

Loss: student s: CE(s) + KD(s, a); branch a: CE(a) + KD(a, t) + KD(a, s); the other side of each KD
detached, T = 4, T^2, all weights 1. The branch is the teacher's last stage and classifier, trained,
on the frozen teacher's own feature in front of them; it stands between the teacher t and the
student. "feature" (weight 0 by default): mean squared difference of the last stages' features, the
branch's detached.

Differs: the branch starts as a copy of the teacher's last stage, as the paper says; the released
code re-initialises it (start="random"). The teacher is in eval mode; the code has it in train mode
(teacher_mode="train": batch statistics in the targets, running statistics that move, in a copy: the
teacher itself stays as it is).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow, describe_tap
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.network_checks import check_inputs, check_tapped
from kdtoolkit.methods.teacher_losses import LossBuilder, TeacherLosses
from kdtoolkit.methods.terms import describe_feature, describe_weights, merge_weights, weights_at
from kdtoolkit.methods.train_mode_teacher import TrainModeTeacher
from kdtoolkit.models.head import num_outputs
from kdtoolkit.models.network_cut import boundary_taps, cut_network, resolve_cut, share_trunk
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.models.tail import Tail
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step, TapKey
from kdtoolkit.utils.validation import check_choice, check_temperature

STARTS = ("teacher", "random")
MODES = ("eval", "train")
TERMS = {  # what is trained, what it is compared with
    "ce": ("student logits", "labels"),
    "kd": ("student logits", "branch logits"),
    "ce/branch": ("branch logits", "labels"),
    "kd/branch": ("branch logits", "teacher logits"),
    "mutual/branch": ("branch logits", "student logits"),
}
DEFAULT_WEIGHTS: dict[str, LossWeight] = {**dict.fromkeys(TERMS, 1.0), "feature": 0.0}


class SOKD(Method):
    """A frozen teacher, a trained branch behind its last shared stage, and a student.

    Its networks are "student" and "branch": the teacher with the branch in place of its last stage.

    Args:
        student: The student.
        teacher: A frozen teacher with the student's classes.
        weights: Weights of "ce", "kd", "ce/branch", "kd/branch", "mutual/branch" (default 1) and
            "feature" (default 0), numbers or schedules.
        temperature: No unit, above 0.
        cut: Stage number or module name of the teacher behind which the branch starts; "auto" is
            the last boundary in front of its last stage.
        start: Initial weights of the branch: "teacher", a copy of the teacher's, or "random".
        teacher_mode: "eval", or "train" for batch statistics.
        preprocess: Input normalisation of the student; default that of its `pretrained_cfg`.
        image: Height and width of the data in pixels, where the student's own size is fixed and
            differs.

    Raises:
        ValueError: For other classes than the student's, unknown weights, a place where the teacher
            cannot be cut, or the loss "feature" where the branch has no feature.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        *,
        weights: Mapping[str, LossWeight] | None = None,
        temperature: float = 4.0,
        cut: TapKey = "auto",
        start: str = "teacher",
        teacher_mode: str = "eval",
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_tapped("SOKD", "student", student)
        check_tapped("SOKD", "teacher", teacher)
        check_inputs("SOKD", preprocess, image)
        check_temperature(temperature)
        check_choice("start", start, STARTS)
        check_choice("teacher_mode", teacher_mode, MODES)
        _check_classes(student, teacher)
        self.weights = merge_weights("SOKD", DEFAULT_WEIGHTS, weights)
        self.temperature, self.teachers = temperature, (teacher,)
        self.preprocess = preprocess or Preprocess.from_model(student.model, image)
        self.student, self.taps = student.model, student
        cut = resolve_cut(teacher, cut)
        self._boundary = boundary_taps(teacher, cut)
        compares_features = self.weights["feature"] != 0
        if compares_features:
            _check_branch_has_feature(teacher, cut)
        read = [-1] if compares_features else []
        trunk = _float32_copy(teacher)
        self.drift = (
            TrainModeTeacher(trunk, self._boundary, teacher.size)
            if teacher_mode == "train"
            else None
        )
        self.branch = Tail(
            _branch_network(teacher, trunk, cut, start), cut, teacher.size, read=read
        )
        ends = (student.boundary_of(-1).shape, teacher.boundary_of(-1).shape)
        self.adapter = Adapter(*ends) if compares_features else None
        student.select(read)
        teacher.select(self._boundary)
        student.check_training_forward()
        self.teacher_losses = TeacherLosses()

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Let the student learn from the branch by further losses, on features or logits.

        In front of the cut the branch's features are those of the frozen teacher. Targets are
        detached.

        Args:
            teachers: Its teacher.
            build: Builds the losses between the student and the branch.

        Raises:
            ValueError: For a loss that runs its teacher's stages on the student's features.
        """
        branch = cast("Frozen", BranchAsTeacher(self.branch.taps))
        self.teacher_losses = TeacherLosses({"student": self.taps}, [branch], build)
        read = self.teacher_losses.teacher_taps(0)
        cut = branch.boundary_of(self.branch.stage).returned_at
        front = [key for key in read if branch.boundary_of(key).returned_at <= cut]
        trunk = self.teachers[0] if self.drift is None else self.drift.taps
        for taps, keys in (
            (trunk, [*self._boundary, *front]),
            (self.branch.taps, [*self.branch.taps.keys, *(k for k in read if k not in front)]),
            (self.taps, [*self.taps.keys, *self.teacher_losses.student_taps("student")]),
        ):
            taps.select(list(dict.fromkeys(keys)))
        self.taps.check_training_forward()

    def forward(self, batch: Batch, clock: Clock) -> Step:
        """The terms of student and branch, and "feature" where its weight is not 0."""
        weights = weights_at(self.weights, clock)
        x = self._prepare(batch["x"])
        teacher = self._run_teacher(batch["x"], x)
        branch = self.branch.run(x, self._features_at_cut(teacher))
        student = self.taps(self.preprocess(batch["x"]))
        losses = functional.sokd_terms(
            student.logits,
            branch.logits,
            teacher.logits,
            batch["y"],
            temperature=self.temperature,
        )
        if self.adapter is not None:
            feature = student.feats[self.taps.resolve_key(-1)]
            target = branch.feats[self.branch.taps.resolve_key(-1)].detach()
            losses["feature"] = functional.fitnet(self.adapter(feature), target)
        weighted = {name: weights[name] * loss for name, loss in losses.items()}
        feats = {k: f.detach() for k, f in {**teacher.feats, **branch.feats}.items()}
        target_out = Out(branch.logits.detach(), feats)
        weighted |= self.teacher_losses(
            {"student": student}, {"student": batch}, clock, lambda number, x: target_out
        )
        return Step(weighted, {"student": student.logits, "branch": branch.logits})

    def _prepare(self, x: Tensor) -> Tensor:
        """The image as the teacher takes it, in the precision of the branch."""
        return self.teachers[0].preprocess(x)

    def _run_teacher(self, x: Tensor, prepared: Tensor) -> Out:
        return self.teachers[0](x) if self.drift is None else self.drift(prepared)

    def _features_at_cut(self, teacher: Out) -> list[Tensor]:
        features = [teacher.feats[key] for key in self._boundary]
        return [functional.at_least_float32(feature).detach() for feature in features]

    # ------------------------------------------------------------------------------ evaluation
    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return {**self.weights, **self.teacher_losses.weights}

    def networks(self) -> dict[str, nn.Module]:
        """The student, and the teacher with the branch in place of its last stage."""
        return {"student": self.student, "branch": self.branch.network}

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of the student or the branch for images in [0, 1]."""
        if name == "student":
            return check_logits(self.student, self.student(self.preprocess(x)))
        prepared = self._prepare(x)
        features = self._features_at_cut(self._run_teacher(x, prepared))
        logits: Tensor = self.branch(prepared, features)
        return logits

    def place_teachers(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Put the teacher, its copy in train mode and the branch's trunk on the device."""
        super().place_teachers(device, memory_format, autocast)
        networks = [self.branch.network]
        if self.drift is not None:
            networks.append(self.drift.taps.model)
        for network in networks:
            network.to(device=device).to(memory_format=memory_format)  # type: ignore[call-overload]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile student and teacher; the branch runs from the teacher's feature and is not."""
        self.taps.compile()
        if self.drift is None:
            self.teachers[0].compile()

    def release(self) -> None:
        """Remove all hooks, and give the teacher back as it was."""
        self.taps.remove_hooks()
        self.branch.taps.remove_hooks()
        if self.drift is not None:
            self.drift.taps.remove_hooks()
        super().release()
        for teacher in self.teachers:
            teacher.release()

    def plan(self) -> MethodPlan:
        """Rows of losses, parameters, and where the branch leaves the teacher."""
        weights, teacher = describe_weights(self.weights), self.teachers[0]
        rows = [
            PlanRow(loss=name, weight=weights[name], student=trained, teacher=target)
            for name, (trained, target) in TERMS.items()
        ]
        if self.adapter is not None:
            rows.append(self._feature_row(self.adapter, weights["feature"]))
        counts = {
            "student": num_parameters(self.student),
            "branch": num_parameters(self.branch),
            "teacher": num_parameters(teacher.model),
        }
        rows += self.teacher_losses.plan_rows(teacher_name="branch")
        if len(self.teacher_losses):
            counts["adapters"] = num_parameters(self.teacher_losses)
        end = teacher.boundary_of(self.branch.stage)
        note = f"the branch leaves the teacher behind {describe_feature(end)}"
        return {"losses": rows, "parameters": counts, "notes": [note]}

    def _feature_row(self, adapter: Adapter, weight: float | str) -> PlanRow:
        row = PlanRow(loss="feature", weight=weight)
        row.update(describe_tap("student", self.taps, -1))
        row.update(describe_tap("teacher", self.teachers[0], -1))
        row["teacher"] = f"branch {row['teacher']}"
        row["adapter"] = "identity" if adapter.is_identity else "Adapter"
        row["adapter_parameters"] = num_parameters(adapter)
        return row


class BranchAsTeacher(Taps):
    """The structure of SOKD's branch, as a complete network, for losses between it and the student.

    Args:
        taps: Taps of the branch.
    """

    def __init__(self, taps: Taps) -> None:
        super().__init__(taps.model, None, taps.size)
        self._trace, self._stages = taps.trace, taps.stages

    def check_replaceable(self, key: TapKey) -> None:
        """Refuse every tap: the branch is trained, and would learn from this loss."""
        raise ValueError(
            "SOKD's branch is a trained network, whose stages a loss cannot run on the student's "
            "features: choose a loss that only compares features, such as at, sp or fitnet, or "
            "srkd with reset=()"
        )


@register_strategy(
    "sokd",
    losses=DEFAULT_WEIGHTS,
    title="Semi-online knowledge distillation, SOKD (Liu et al. 2021)",
    needs_teacher=True,
)
def sokd(
    inputs: StrategyInputs,
    *,
    temperature: float = 4.0,
    cut: TapKey = "auto",
    start: str = "teacher",
    teacher_mode: str = "eval",
) -> Method:
    """Build semi-online distillation with a trained branch on a frozen teacher.

    `losses={..., "feature": 1.0}` adds the comparison of features.

    Args:
        inputs: The student, one teacher, and weights.
        temperature: Of targets and predictions, no unit, above 0.
        cut: Stage number or module name of the teacher behind which the branch starts; "auto" is
            the last boundary in front of its last stage.
        start: Initial weights of the branch: "teacher" copies the teacher's, "random"
            re-initialises them.
        teacher_mode: Mode of the teacher, "eval", or "train" for batch statistics.

    Returns:
        The method.
    """
    if len(inputs.teachers) != 1:
        raise ValueError(f"SOKD has one teacher, {len(inputs.teachers)} were given")
    return SOKD(
        inputs.student,
        inputs.teachers[0],
        weights=inputs.weights,
        temperature=temperature,
        cut=cut,
        start=start,
        teacher_mode=teacher_mode,
        preprocess=inputs.preprocess,
        image=inputs.image,
    )


def _check_classes(student: Taps, teacher: Frozen) -> None:
    if num_outputs(student) != num_outputs(teacher):
        raise ValueError(
            f"the teacher has {num_outputs(teacher)} classes, the student {num_outputs(student)}: "
            "SOKD compares logits"
        )


def _check_branch_has_feature(teacher: Frozen, cut: TapKey) -> None:
    if teacher.boundary_of(-1).returned_at <= teacher.boundary_of(cut).returned_at:
        raise ValueError(
            f"cut={cut!r} is the teacher's last stage: the branch has no feature for the loss "
            "'feature'"
        )


def _branch_network(teacher: Frozen, trunk: nn.Module, cut: TapKey, start: str) -> nn.Module:
    """A complete network with the given trunk and a trained part behind the cut."""
    network = _float32_copy(teacher).requires_grad_(True)
    if start == "random":
        network = reinitialised_copy(network, torch.initial_seed() % 2**32 + 1)
    share_trunk(network, trunk, cut_network(teacher, cut))
    return network


def _float32_copy(teacher: Frozen) -> nn.Module:
    """A copy of the teacher's network; the teacher's hooks have no effect in it."""
    return copy.deepcopy(teacher.model).float()
