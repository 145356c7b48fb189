"""Semi-online knowledge distillation, SOKD (Liu, Liu, Huang 2021, arXiv 2111.11747).

Loss     student: CE(s) + KD(s, a); branch: CE(a) + KD(a, t) + KD(a, s); the other side of each KD detached, T = 4, T^2,
         all weights 1. The branch a is the teacher's last stage and classifier, trained, on the frozen teacher's own
         feature in front of them; it stands between the teacher t and the student s.
         "feature" (weight 0 by default): mean squared difference of the last stages' features, the branch's detached
Differs  the branch starts as a copy of the teacher's last stage, as the paper says; the released code draws it anew
         (start="random"). The teacher is in eval mode; the code has it in train mode (teacher_mode="train": batch
         statistics in the targets, running statistics that drift, in a copy: the teacher itself is left alone)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.functional.logits import at_least_float32
from kdtoolkit.models.head import num_outputs
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.models.subnetwork import Tail, boundary, cut_at, cut_of, graft
from kdtoolkit.schedules import describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step, TapKey
from kdtoolkit.utils.validation import check_choice, check_temperature

STARTS = ("teacher", "random")
MODES = ("eval", "train")
TERMS = {  # of whom, from what
    "ce": ("student logits", "labels"),
    "kd": ("student logits", "branch logits"),
    "ce/branch": ("branch logits", "labels"),
    "kd/branch": ("branch logits", "teacher logits"),
    "mutual/branch": ("branch logits", "student logits"),
}


class SOKD(Method):
    """A frozen teacher, a trained branch behind its last shared stage, and a student.

    student       Taps;  teacher  Frozen, with the student's classes
    weights       of "ce", "kd", "ce/branch", "kd/branch", "mutual/branch" (default 1) and "feature" (0)
    temperature   no unit, > 0
    cut           of the teacher, a stage or a module's name; "auto" is the last boundary in front of its last stage
    start         first weights of the branch: "teacher", a copy of the teacher's, or "random"
    teacher_mode  "eval", or "train" for batch statistics

    Networks "student" and "branch", the teacher with the branch in place of its last stage.
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
    ):
        super().__init__()
        check_temperature(temperature)
        check_choice("start", start, STARTS)
        check_choice("teacher_mode", teacher_mode, MODES)
        if num_outputs(student) != num_outputs(teacher):
            raise ValueError(
                f"the teacher has {num_outputs(teacher)} classes, the student {num_outputs(student)}: SOKD compares logits"
            )
        self.weights: dict[str, LossWeight] = {
            **dict.fromkeys(TERMS, 1.0),
            "feature": 0.0,
            **(weights or {}),
        }
        unknown = [name for name in self.weights if name not in (*TERMS, "feature")]
        if unknown:
            raise ValueError(
                f"weights of SOKD: unknown loss {unknown[0]!r}. Known: {', '.join((*TERMS, 'feature'))}"
            )
        self.temperature, self.teachers = temperature, (teacher,)
        self.preprocess = preprocess or Preprocess.of(student.model, image)
        self.student, self.taps = student.model, student
        cut = cut_of(teacher, cut)
        self._boundary = boundary(teacher, cut)
        trunk = _copied(teacher)
        self.drift = Drift(trunk, self._boundary, teacher.size) if teacher_mode == "train" else None
        whole = _copied(teacher)
        if start == "random":
            whole = reinitialised_copy(whole.requires_grad_(True), torch.initial_seed() % 2**32 + 1)
        graft(whole.requires_grad_(True), trunk, cut_at(teacher, cut))
        compares = self.weights["feature"] != 0
        if compares and teacher.end(-1).left <= teacher.end(cut).left:
            raise ValueError(
                f"cut={cut!r} is the teacher's last stage: the branch has no feature for the loss 'feature'"
            )
        self.branch = Tail(whole, cut, teacher.size, read=[-1] if compares else [])
        self.adapter = Adapter(student.end(-1).shape, teacher.end(-1).shape) if compares else None
        student.select([-1] if compares else [])
        teacher.select(self._boundary)
        student.rehearse()

    def forward(self, batch: Batch, clock: Clock) -> Step:
        weights = {name: weight_at(weight, clock) for name, weight in self.weights.items()}
        labels, t = batch["y"], self.temperature
        x = self._of_teacher(batch["x"])
        teacher = self._teacher(batch["x"], x)
        branch = self.branch.run(x, self._feature(teacher))
        student = self.taps(self.preprocess(batch["x"]))
        s, a = student.logits, branch.logits
        losses = {
            "ce": functional.ce(s, labels),
            "kd": functional.kd(s, a.detach(), temperature=t),
            "ce/branch": functional.ce(a, labels),
            "kd/branch": functional.kd(a, teacher.logits.detach(), temperature=t),
            "mutual/branch": functional.kd(a, s.detach(), temperature=t),
        }
        if self.adapter is not None:
            (mine,), last = student.feats.values(), self.branch.taps.keys[-1]
            losses["feature"] = functional.fitnet(self.adapter(mine), branch.feats[last].detach())
        return Step(
            {name: weights[name] * loss for name, loss in losses.items()},
            {"student": s, "branch": a},
        )

    def _of_teacher(self, x: Tensor) -> Tensor:
        """The image as the teacher takes it, in the precision of the branch."""
        return self.teachers[0].preprocess(x)

    def _teacher(self, x: Tensor, prepared: Tensor) -> Out:
        return self.teachers[0](x) if self.drift is None else self.drift(prepared)

    def _feature(self, teacher: Out) -> list[Tensor]:
        return [at_least_float32(teacher.feats[key]).detach() for key in self._boundary]

    # ---------------------------------------------------------------------------------------------------- evaluation
    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "branch": self.branch.network}

    def logits(self, name: str, x: Tensor) -> Tensor:
        if name == "student":
            return self.student(self.preprocess(x))
        prepared = self._of_teacher(x)
        return self.branch(prepared, self._feature(self._teacher(x, prepared)))

    def place_teachers(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format,
              autocast: torch.dtype | None = None) -> None:  # fmt: skip
        super().place_teachers(device, memory_format, autocast)
        for net in (self.branch.network, *(() if self.drift is None else (self.drift.taps.model,))):
            net.to(device=device).to(memory_format=memory_format)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The branch is run from the teacher's feature, which cannot be compiled; the other two are."""
        self.taps.compile()
        if self.drift is None:
            self.teachers[0].compile()

    def release(self) -> None:
        self.taps.remove()
        self.branch.taps.remove()
        if self.drift is not None:
            self.drift.taps.remove()
        super().release()
        for teacher in self.teachers:
            teacher.release()

    def plan(self) -> dict[str, Any]:
        weights = {name: describe_weight(w) for name, w in self.weights.items()}
        rows: list[dict[str, Any]] = [
            {"loss": name, "weight": weights[name], "student": of, "teacher": what}
            for name, (of, what) in TERMS.items()
        ]
        teacher = self.teachers[0]
        if self.adapter is not None:
            row: dict[str, Any] = {"loss": "feature", "weight": weights["feature"]}
            for side, taps in (("student", self.taps), ("teacher", teacher)):
                end = taps.end(-1)
                row |= {
                    side: end.name,
                    f"{side}_shape": list(end.shape),
                    f"{side}_layout": end.shape.layout,
                }
            row["teacher"] = f"branch {row['teacher']}"
            name = "identity" if self.adapter.is_identity else "Adapter"
            rows.append(row | {"adapter": name, "adapter_parameters": num_parameters(self.adapter)})
        end = teacher.end(self.branch.stage)
        note = f"the branch leaves the teacher behind {end.name}, {'x'.join(map(str, end.shape))} {end.shape.layout}"
        nets = {"student": self.student, "branch": self.branch, "teacher": teacher.model}
        return {
            "losses": rows,
            "parameters": {name: num_parameters(net) for name, net in nets.items()},
            "notes": [note],
        }


class Drift(nn.Module):
    """A teacher's copy in train mode while the method is: batch statistics, running ones that move. Only these buffers
    are in the module tree, as a part of the checkpoint."""

    def __init__(self, net: nn.Module, at: list[TapKey], size: Any):
        super().__init__()
        self.taps = Taps(net.requires_grad_(False), at, size)
        for number, (module, name, persistent) in enumerate(self._held()):
            self.register_buffer(f"statistic{number}", module._buffers[name], persistent=persistent)

    def _held(self) -> list[tuple[nn.Module, str, bool]]:
        modules = self.taps.model.modules()
        return [(m, n, n not in m._non_persistent_buffers_set) for m in modules for n in m._buffers]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Out:
        self.taps.model.train(self.training)
        return self.taps(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Drift:
        super()._apply(fn, recurse)
        for number, (module, name, _) in enumerate(self._held()):
            module._buffers[name] = self._buffers[f"statistic{number}"]
        return self


@register_strategy(
    "sokd",
    losses={**dict.fromkeys(TERMS, 1.0), "feature": 0.0},
    title="Semi-online knowledge distillation, SOKD (Liu et al. 2021)",
    needs_teacher=True,
)
def sokd(
    given: StrategyInputs,
    *,
    temperature: float = 4.0,
    cut: TapKey = "auto",
    start: str = "teacher",
    teacher_mode: str = "eval",
) -> Method:
    """cut: of the teacher, a stage or a module's name; start: "teacher" or "random"; teacher_mode: "eval" or "train".
    losses={..., "feature": 1.0} adds the features."""
    if len(given.teachers) != 1:
        raise ValueError(f"SOKD has one teacher, {len(given.teachers)} were given")
    return SOKD(
        given.student, given.teachers[0], weights=given.weights, temperature=temperature, cut=cut, start=start,
        teacher_mode=teacher_mode, preprocess=given.preprocess, image=given.image,
    )  # fmt: skip


def _copied(teacher: Frozen) -> nn.Module:
    """The teacher's network in float32; its hooks have no effect in a copy."""
    return copy.deepcopy(teacher.model).float()
