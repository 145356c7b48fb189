"""Be your own teacher, BYOT (Zhang, Song, Gao, Chen, Bao, Ma 2019, arXiv 1905.08094).

Loss: CE(z_0) + sum over exits i of [0.7 CE(z_i) + 0.3 soft CE(z_i, z_0)] + 0.03 times the sum of
||A_i f_i - f_0||_F, where z_0 and f_0, the network's own logits and last feature, are constants for
its exits; T = 3, no T^2, one unsquared norm over the whole batch. The f are pooled vectors. This is
the authors' code of 2021.

Differs: an exit is a 1x1 convolution, pooling to the shape of the last stage and one separable
convolution, for any layout; the authors have up to three of these with attention. A_1, of the
deepest exit, is exempt in their code and not built here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow, describe_tap
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.layout_conversion import as_map
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.network_checks import check_inputs, check_tapped
from kdtoolkit.methods.teacher_losses import LossBuilder, TeacherLosses
from kdtoolkit.methods.terms import describe_weights, merge_weights, weights_at
from kdtoolkit.models.head import num_outputs
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Shape, Step
from kdtoolkit.utils.validation import check_temperature, describe_value, plain_scalar

TERMS: dict[str, LossWeight] = {"ce": 1.0, "ce/exits": 0.7, "soft": 0.3, "feature": 0.03}


class Exit(nn.Module):
    """A classifier behind a stage.

    Args:
        shape: Shape of this stage's feature.
        deepest: Shape of the last stage's feature, which has D channels.
        classes: C, the number of classes.
        hint: Whether a linear map A stands in front of the comparison with the last stage; without
            it the pooled vector is compared.
    """

    def __init__(self, shape: Shape, deepest: Shape, classes: int, hint: bool) -> None:
        super().__init__()
        width = deepest.channels
        self.adapter = Adapter(shape, (width, *deepest.grid))
        self.separable = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(width, classes)
        self.hint = nn.Linear(width, width) if hint else nn.Identity()

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The vector (B, D) to compare with the last stage, and logits (B, C)."""
        vector = self.separable(self.adapter(feature)).mean((2, 3))
        return self.hint(vector), self.classifier(vector)


class BYOT(Method):
    """One network that teaches classifiers behind its earlier stages, its exits.

    "exit1" stands behind the first stage, and so on. The bare network is exported. Exits and
    "ensemble", the mean of all logits, are evaluated beside it; the exits' weights are in the
    checkpoints.

    Args:
        student: Taps of any network with two stages or more.
        weights: Weights of "ce", "ce/exits", "soft" and "feature", numbers or schedules; default
            the authors'.
        temperature: Of "soft", no unit, above 0.
        exempt: Which exit's feature is not compared, 1 is the deepest; None compares all.
        stages: Stages with exits: "all" but the last, or their numbers.
        preprocess: Input normalisation; default that of the network's `pretrained_cfg`.
        image: Height and width of the data in pixels, where the network's own size is fixed and
            differs.

    Raises:
        ValueError: For unknown weights, or stages or exits that do not exist.
    """

    def __init__(
        self,
        student: Taps,
        weights: Mapping[str, LossWeight] | None = None,
        *,
        temperature: float = 3.0,
        exempt: int | None = 1,
        stages: str | Sequence[int] = "all",
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_tapped("BYOT", "student", student)
        check_inputs("BYOT", preprocess, image)
        check_temperature(temperature)
        self.weights = merge_weights("BYOT", TERMS, weights)
        self.temperature, self.exempt = temperature, exempt
        self.preprocess = preprocess or Preprocess.from_model(student.model, image)
        self.exit_stages = _exit_stages(stages, len(student.stages), type(student.model).__name__)
        _check_exempt(exempt, len(self.exit_stages))
        self.student, self.taps = student.model, student
        self.last_stage = len(student.stages)
        self.deepest = student.boundary_of(-1).shape
        self.exits = nn.ModuleDict(self._make_exits())
        student.select([*self.exit_stages, self.last_stage])
        student.check_training_forward()
        self.teacher_losses = TeacherLosses()

    def _make_exits(self) -> dict[str, Exit]:
        classes = num_outputs(self.taps)
        exempt_stage = None if self.exempt is None else self.exit_stages[-self.exempt]
        return {
            f"exit{s}": Exit(
                self.taps.boundary_of(s).shape, self.deepest, classes, s != exempt_stage
            )
            for s in self.exit_stages
        }

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Let the network learn from frozen teachers, too.

        Args:
            teachers: The frozen teachers.
            build: Builds the losses between the network and the teachers.
        """
        self.teachers = tuple(teachers)
        self.teacher_losses = TeacherLosses.of_student(self.taps, teachers, build)

    def forward(self, batch: Batch, clock: Clock) -> Step:
        """The four terms; one of weight 0 still reads the exits' parameters, as DDP requires."""
        out, labels = self.taps(self.preprocess(batch["x"])), batch["y"]
        weights = weights_at(self.weights, clock)
        losses = self._losses(out, labels, weights)
        weighted: dict[str, Tensor] = {}
        for term, weight in weights.items():
            is_on = term in losses
            weighted[term] = weight * losses[term] if is_on else zero_loss(self.exits, out.logits)
        weighted |= self.teacher_losses({"student": out}, {"student": batch}, clock)
        return Step(weighted, {"student": out.logits})

    def _losses(self, out: Out, labels: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Unweighted terms whose weight is not 0."""
        vectors, logits = self._run_exits(out)
        losses: dict[str, Tensor] = {}
        if weights["ce"]:
            losses["ce"] = functional.ce(out.logits, labels)
        if weights["ce/exits"]:
            losses["ce/exits"] = torch.stack([functional.ce(z, labels) for z in logits]).sum()
        if weights["soft"]:
            all_logits = [out.logits, *logits]
            soft = functional.byot_logits(all_logits, temperature=self.temperature)
            losses["soft"] = soft.sum()
        num_exempt = 0 if self.exempt is None else 1
        if weights["feature"] and len(vectors) > num_exempt:
            deepest = as_map(out.feats[self.last_stage], self.deepest).mean((2, 3))
            losses["feature"] = functional.byot_features([deepest, *vectors], exempt=self.exempt)
        return losses

    def _run_exits(self, out: Out) -> tuple[list[Tensor], list[Tensor]]:
        """Vectors (B, D) and logits (B, C) of the exits, deepest first."""
        pairs = [self.exits[f"exit{s}"](out.feats[s]) for s in reversed(self.exit_stages)]
        return [vector for vector, _ in pairs], [logits for _, logits in pairs]

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return {**self.weights, **self.teacher_losses.weights}

    def networks(self) -> dict[str, nn.Module]:
        """The bare network, "student"."""
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of the network, an exit or the ensemble for images in [0, 1]."""
        if name != "student":
            return self.predict(x)[name]
        return check_logits(self.student, self.student(self.preprocess(x)))

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of the network, of every exit and of their ensemble."""
        out = self.taps(self.preprocess(x))
        _, exit_logits = self._run_exits(out)
        logits = {"student": out.logits}
        logits.update(zip(self.exits, reversed(exit_logits), strict=True))
        return logits | {"ensemble": torch.stack(list(logits.values())).mean(0)}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network; the exits are not."""
        self.taps.compile()
        for teacher in self.teachers:
            teacher.compile()

    def release(self) -> None:
        """Remove all hooks, and give the teachers back as they were."""
        self.taps.remove_hooks()
        self.teacher_losses.release()

    def plan(self) -> MethodPlan:
        """Rows of losses for the network and every exit, deepest first; parameters."""
        weights = describe_weights(self.weights)
        rows = [PlanRow(loss="ce", weight=weights["ce"], student="logits", teacher="labels")]
        for number, stage in enumerate(reversed(self.exit_stages), 1):
            rows += self._exit_rows(stage, weights, compared=number != self.exempt)
        counts = {
            "student": num_parameters(self.student),
            "exits": num_parameters(self.exits),
        }
        rows += self.teacher_losses.plan_rows()
        return {"losses": rows, "parameters": counts | self.teacher_losses.parameter_counts()}

    def _exit_rows(
        self, stage: int, weights: Mapping[str, float | str], compared: bool
    ) -> list[PlanRow]:
        logits, ce, soft = f"exit{stage} logits", weights["ce/exits"], weights["soft"]
        rows = [
            PlanRow(loss="ce/exits", weight=ce, student=logits, teacher="labels"),
            PlanRow(loss="soft", weight=soft, student=logits, teacher="its own logits"),
        ]
        if compared:
            feature = PlanRow(loss="feature", weight=weights["feature"])
            feature.update(describe_tap("student", self.taps, stage))
            feature.update(describe_tap("teacher", self.taps, -1))
            feature["adapter"] = "Exit"
            feature["adapter_parameters"] = num_parameters(self.exits[f"exit{stage}"])
            rows.append(feature)
        return rows


def _exit_stages(stages: str | Sequence[int], count: int, model: str) -> list[int]:
    """Numbers of the stages with exits, in order."""
    if count < 2:
        raise ValueError(
            f"{model} has {count} stages, and an exit stands behind one in front of the last: 2 or "
            "more are needed"
        )
    if isinstance(stages, str) and stages == "all":
        return list(range(1, count))
    given = [plain_scalar(s) for s in stages] if isinstance(stages, (list, tuple)) else []
    numbers = [s for s in given if type(s) is int and 1 <= s < count]
    if not numbers or len(numbers) < len(given) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"stages={describe_value(stages)}: 'all', or different numbers from 1 to "
            f"{count - 1}; behind the last of {count} stages {model} has its own classifier"
        )
    return sorted(numbers)


def _check_exempt(exempt: object, num_exits: int) -> None:
    number = plain_scalar(exempt)
    if number is not None and not (type(number) is int and 1 <= number <= num_exits):
        raise ValueError(
            f"exempt={describe_value(exempt)}: number of an exit, 1 is the deepest of "
            f"{num_exits}, or None to compare all"
        )


@register_strategy("byot", losses=TERMS, title="Be your own teacher, BYOT (Zhang et al. 2019)")
def byot(
    inputs: StrategyInputs,
    *,
    temperature: float = 3.0,
    exempt: int | None = 1,
    stages: str | Sequence[int] = "all",
) -> Method:
    """Build a network that teaches classifiers behind its earlier stages.

    Args:
        inputs: The student and weights.
        temperature: Of the term "soft", no unit, above 0.
        exempt: Number of the exit whose feature is not compared, from 1, the deepest; None compares
            all.
        stages: Stages with exits: "all" but the last, or a list of their numbers, from 1.

    Returns:
        The method.
    """
    return BYOT(
        inputs.student,
        inputs.weights,
        temperature=temperature,
        exempt=exempt,
        stages=stages,
        preprocess=inputs.preprocess,
    )
