"""Batch knowledge ensembling, BAKE (Ge, Choi, Zhang, Tang, Xia, Zhang, Li 2021, arXiv 2104.13298).

Loss: CE + T^2 KL(Q || softmax(z / T)), Q = (1 - w) (I - w A)^-1 softmax(z / T), a constant; A is
the softmax over each row of the similarities of the batch's embeddings, without the diagonal; T =
4, w = 0.5 (0.9 for fine-grained classes). A batch is made of images with 3 others of their class
each, so an epoch covers 4 times the images.

Differs: over several processes each ensembles its own part of the batch; the embedding is the
classifier's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.data.sampling import SameClass
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.network_checks import check_inputs, check_tapped
from kdtoolkit.methods.teacher_losses import LossBuilder, TeacherLosses
from kdtoolkit.methods.terms import describe_weights, merge_weights, weights_at
from kdtoolkit.models.embedding import EmbeddingHook
from kdtoolkit.types import Batch, Clock, LossWeight, Step
from kdtoolkit.utils.validation import check_number, check_temperature, check_whole_number

TERMS: dict[str, LossWeight] = {"ce": 1.0, "bake": 1.0}
TARGETS = {"ce": "labels", "bake": "logits of the batch, mixed by similarity"}


class BAKE(Method):
    """One network whose targets are its own predictions, mixed among similar images of the batch.

    Args:
        student: Taps of any network with a classifier.
        weights: Weights of "ce" and "bake", numbers or schedules; default 1 each.
        temperature: No unit, above 0.
        omega: Share of the neighbours in a target, from 0 to below 1.
        partners: Further images of the same class for each image of a batch, from 0, which draws
            batches evenly. 1 + partners must divide the batch size.
        preprocess: Input normalisation; default that of the network's `pretrained_cfg`.
        image: Height and width of the data in pixels, where the network's own size is fixed and
            differs.

    Raises:
        ValueError: For unknown weights, or numbers out of their range.
    """

    no_compile_reason = (
        "BAKE reads the classifier's input, which a compiled network does not expose"
    )

    def __init__(
        self,
        student: Taps,
        weights: Mapping[str, LossWeight] | None = None,
        *,
        temperature: float = 4.0,
        omega: float = 0.5,
        partners: int = 3,
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_tapped("BAKE", "student", student)
        check_inputs("BAKE", preprocess, image)
        check_temperature(temperature)
        check_number(
            "omega", omega, minimum=0, below=1, meaning="share of the neighbours in a target"
        )
        check_whole_number(
            "partners of SameClass",
            partners,
            minimum=0,
            meaning="further images of the class of each image",
        )
        self.weights = merge_weights("BAKE", TERMS, weights)
        self.batch_sampler = SameClass(partners) if partners != 0 else None
        self.temperature, self.omega, self.partners = temperature, omega, partners
        self.preprocess = preprocess or Preprocess.from_model(student.model, image)
        self.student, self.taps = student.model, student.select([])
        student.check_training_forward()
        self.embedding = EmbeddingHook.from_taps(student)
        self.teacher_losses = TeacherLosses()

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Let the network learn from frozen teachers, too.

        Args:
            teachers: The frozen teachers.
            build: Builds the losses between the network and the teachers.
        """
        self.teachers = tuple(teachers)
        self.teacher_losses = TeacherLosses.of_student(self.taps, teachers, build)

    def forward(self, batch: Batch, clock: Clock) -> Step:
        """Cross-entropy, and the KL divergence from the targets of the batch."""
        out, vectors = self.embedding.capture(self.taps, self.preprocess(batch["x"]))
        weights = weights_at(self.weights, clock)
        losses = dict.fromkeys(weights, out.logits.float().sum() * 0.0)
        if weights["ce"]:
            losses["ce"] = weights["ce"] * functional.ce(out.logits, batch["y"])
        if weights["bake"]:
            losses["bake"] = weights["bake"] * self._kd(out.logits, vectors)
        losses |= self.teacher_losses({"student": out}, {"student": batch}, clock)
        return Step(losses, {"student": out.logits})

    def _kd(self, logits: Tensor, vectors: Tensor) -> Tensor:
        targets = functional.bake_targets(
            logits, vectors, temperature=self.temperature, omega=self.omega
        )
        return functional.bake_kd(logits, targets, temperature=self.temperature)

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return {**self.weights, **self.teacher_losses.weights}

    def networks(self) -> dict[str, nn.Module]:
        """The network, "student"."""
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) for images in [0, 1]."""
        return check_logits(self.student, self.student(self.preprocess(x)))

    def release(self) -> None:
        """Remove all hooks."""
        self.embedding.remove()
        self.taps.remove_hooks()
        self.teacher_losses.release()

    def plan(self) -> MethodPlan:
        """Rows of losses, parameters, and what the sampling means for the length of an epoch."""
        rows = [
            PlanRow(loss=term, weight=weight, student="logits", teacher=TARGETS[term])
            for term, weight in describe_weights(self.weights).items()
        ]
        group = 1 + self.partners
        note = f"batches of groups of {group}: an epoch has {group} times the steps"
        counts = {"student": num_parameters(self.student)}
        return {
            "losses": rows + self.teacher_losses.plan_rows(),
            "parameters": counts | self.teacher_losses.parameter_counts(),
            "notes": [note] if self.partners else [],
        }


@register_strategy("bake", losses=TERMS, title="Batch knowledge ensembling, BAKE (Ge et al. 2021)")
def bake(
    inputs: StrategyInputs, *, temperature: float = 4.0, omega: float = 0.5, partners: int = 3
) -> Method:
    """Build batch knowledge ensembling of one network.

    Args:
        inputs: The student and weights.
        temperature: Of targets and predictions, no unit, above 0.
        omega: Share of the neighbours in a target, from 0 to below 1; 0.9 for fine-grained classes.
        partners: Further images of the same class for each image of a batch, a whole number from 0;
            1 + partners must divide the batch size.

    Returns:
        The method.
    """
    return BAKE(
        inputs.student,
        inputs.weights,
        temperature=temperature,
        omega=omega,
        partners=partners,
        preprocess=inputs.preprocess,
    )
