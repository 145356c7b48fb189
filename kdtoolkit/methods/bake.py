"""Batch knowledge ensembling, BAKE (Ge, Choi, Zhang, Tang, Xia, Zhang, Li 2021, arXiv 2104.13298).

Loss     CE + T^2 KL(Q || softmax(z / T)), Q = (1 - w) (I - w A)^-1 softmax(z / T), constant; A the softmax over each
         row of the similarities of the batch's embeddings, without the diagonal; T = 4, w = 0.5 (0.9 for fine-grained
         classes). A batch is made of images with 3 others of their class each, so an epoch covers 4 times the images
Differs  over several processes each ensembles its own part of the batch; the embedding is the classifier's input
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.data.sampling import SameClass
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.subnetwork import Embedding
from kdtoolkit.schedules import describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Step
from kdtoolkit.utils.validation import check_temperature

TERMS: dict[str, LossWeight] = {"ce": 1.0, "bake": 1.0}


class BAKE(Method):
    """One network whose targets are its own predictions, mixed among similar images of the batch.

    student      Taps of any network with a classifier
    weights      {"ce", "bake": number or schedule}; default 1 each
    temperature  no unit, > 0
    omega        share of the neighbours in a target, 0 to below 1
    partners     further images of the same class for each image of a batch; 0 draws batches evenly. 1 + partners must
                 divide the batch size
    """

    no_compile_reason = "BAKE reads the classifier's input, which a compiled network does not give away"

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
    ):
        super().__init__()
        check_temperature(temperature)
        if not 0 <= omega < 1:
            raise ValueError(
                f"omega={omega!r}: the neighbours' share in a target, from 0 to below 1"
            )
        unknown = [term for term in weights or {} if term not in TERMS]
        if unknown:
            raise ValueError(f"BAKE has no loss {unknown[0]!r}; it has {', '.join(TERMS)}")
        self.batch_sampler = SameClass(partners) if partners != 0 else None
        self.weights = {**TERMS, **(weights or {})}
        self.temperature, self.omega, self.partners = temperature, omega, partners
        self.preprocess = preprocess or Preprocess.of(student.model, image)
        self.student, self.taps = student.model, student.select([])
        student.rehearse()
        self.embedding = Embedding.at(student)

    def forward(self, batch: Batch, clock: Clock) -> Step:
        out, vectors = self.embedding.of(self.taps, self.preprocess(batch["x"]))
        weights = {term: weight_at(weight, clock) for term, weight in self.weights.items()}
        losses = {term: out.logits.float().sum() * 0.0 for term in weights}
        if weights["ce"]:
            losses["ce"] = weights["ce"] * functional.ce(out.logits, batch["y"])
        if weights["bake"]:
            given = {"temperature": self.temperature, "omega": self.omega}
            targets = functional.bake_targets(out.logits, vectors, **given)
            soft = functional.bake_kd(out.logits, targets, temperature=self.temperature)
            losses["bake"] = weights["bake"] * soft
        return Step(losses, {"student": out.logits})

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.student(self.preprocess(x))

    def release(self) -> None:
        self.embedding.remove()
        self.taps.remove()

    def plan(self) -> dict[str, Any]:
        whom = {"ce": "labels", "bake": "logits of the batch, mixed by similarity"}
        weights = {t: describe_weight(w) for t, w in self.weights.items()}
        rows = [
            {"loss": t, "weight": w, "student": "logits", "teacher": whom[t]}
            for t, w in weights.items()
        ]
        group = 1 + self.partners
        notes = (
            [f"batches of groups of {group}: an epoch has {group} times the steps"]
            if self.partners
            else []
        )
        return {
            "losses": rows,
            "parameters": {"student": num_parameters(self.student)},
            "notes": notes,
        }


@register_strategy("bake", losses=TERMS, title="Batch knowledge ensembling, BAKE (Ge et al. 2021)")
def bake(
    given: StrategyInputs, *, temperature: float = 4.0, omega: float = 0.5, partners: int = 3
) -> Method:
    """temperature: no unit; omega: share of the neighbours in a target; partners: of the same class for each image."""
    options: dict[str, Any] = {"temperature": temperature, "omega": omega, "partners": partners}
    return BAKE(given.student, given.weights, preprocess=given.preprocess, **options)
