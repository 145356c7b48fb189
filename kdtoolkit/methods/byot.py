"""Be your own teacher, BYOT (Zhang, Song, Gao, Chen, Bao, Ma 2019, arXiv 1905.08094; the authors' code of 2021).

Loss     CE(z_0) + sum over exits i of [0.7 CE(z_i) + 0.3 soft CE(z_i, z_0)] + 0.03 sum of ||A_i f_i - f_0||_F, where
         z_0 and f_0, the network's own logits and last feature, are constants for its exits; T = 3, no T^2, one
         unsquared norm over the whole batch. f are pooled vectors
Differs  an exit is a 1x1 convolution and pooling to the shape of the last stage and one separable convolution, for any
         layout; the authors have up to three of these with attention. A_1, of the deepest exit, is exempt in their code
         and not built here
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.adapters import Adapter, as_map
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.head import num_outputs
from kdtoolkit.schedules import describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Shape, Step
from kdtoolkit.utils.validation import check_temperature

TERMS: dict[str, LossWeight] = {"ce": 1.0, "ce/exits": 0.7, "soft": 0.3, "feature": 0.03}


class Exit(nn.Module):
    """A classifier behind a stage: feature -> (vector to compare with the deepest (B, D), logits (B, C)).

    shape, deepest  of this stage's and the last stage's feature, which has D channels
    hint            whether a linear map A stands in front of the comparison; without it the vector is the pooled one
    """

    def __init__(self, shape: Shape, deepest: Shape, classes: int, hint: bool):
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
        vector = self.separable(self.adapter(feature)).mean((2, 3))
        return self.hint(vector), self.classifier(vector)


class BYOT(Method):
    """One network that teaches the classifiers behind its earlier stages: "exit1" behind the first, and so on.

    student      Taps of any network with two stages or more
    weights      {"ce", "ce/exits", "soft", "feature": number or schedule}; default the authors'
    temperature  of "soft", no unit, > 0
    exempt       which exit's feature is not compared, 1 is the deepest; None compares all
    stages       "all" but the last, or their numbers: where the exits are

    The product is the bare network. Exits and "ensemble", the mean of all logits, are evaluated beside it; the exits'
    weights are in the checkpoints.
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
    ):
        super().__init__()
        check_temperature(temperature)
        unknown = [term for term in weights or {} if term not in TERMS]
        if unknown:
            raise ValueError(f"BYOT has no loss {unknown[0]!r}; it has {', '.join(TERMS)}")
        self.weights = {**TERMS, **(weights or {})}
        self.temperature, self.exempt = temperature, exempt
        self.preprocess = preprocess or Preprocess.of(student.model, image)
        self.places = _numbers(stages, len(student.stages), type(student.model).__name__)
        if exempt is not None and exempt not in range(1, len(self.places) + 1):
            raise ValueError(
                f"exempt={exempt!r}: number of an exit, 1 is the deepest of {len(self.places)}, or None to compare all"
            )
        self.student, self.taps, self.last = student.model, student, len(student.stages)
        self.deepest, classes = student.end(-1).shape, num_outputs(student)
        spared = None if exempt is None else self.places[-exempt]
        self.exits = nn.ModuleDict(
            {
                f"exit{s}": Exit(student.end(s).shape, self.deepest, classes, s != spared)
                for s in self.places
            }
        )
        student.select([*self.places, self.last])
        student.rehearse()

    def forward(self, batch: Batch, clock: Clock) -> Step:
        out, y = self.taps(self.preprocess(batch["x"])), batch["y"]
        vectors, logits = self._exits(out)
        weights = {term: weight_at(weight, clock) for term, weight in self.weights.items()}
        losses: dict[str, Tensor] = {}
        if weights["ce"]:
            losses["ce"] = functional.ce(out.logits, y)
        if weights["ce/exits"]:
            losses["ce/exits"] = torch.stack([functional.ce(z, y) for z in logits]).sum()
        if weights["soft"]:
            losses["soft"] = functional.byot_logits(
                [out.logits, *logits], temperature=self.temperature
            ).sum()
        if weights["feature"] and len(vectors) > (self.exempt is not None):
            deepest = as_map(out.feats[self.last], self.deepest).mean((2, 3))
            losses["feature"] = functional.byot_features([deepest, *vectors], exempt=self.exempt)
        weighted = {
            t: w * losses[t] if t in losses else zero_loss(self.exits, out.logits)
            for t, w in weights.items()
        }
        return Step(weighted, {"student": out.logits})

    def _exits(self, out: Out) -> tuple[list[Tensor], list[Tensor]]:
        """Vectors (B, D) and logits (B, C) of the exits, deepest first."""
        found = [self.exits[f"exit{s}"](out.feats[s]) for s in reversed(self.places)]
        return [v for v, _ in found], [z for _, z in found]

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.student(self.preprocess(x)) if name == "student" else self.predict(x)[name]

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Of the network, every exit and their ensemble."""
        out = self.taps(self.preprocess(x))
        answers = {
            "student": out.logits,
            **dict(zip(self.exits, reversed(self._exits(out)[1]), strict=True)),
        }
        return answers | {"ensemble": torch.stack(list(answers.values())).mean(0)}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.taps.compile()

    def release(self) -> None:
        self.taps.remove()

    def plan(self) -> dict[str, Any]:
        weights = {t: describe_weight(w) for t, w in self.weights.items()}
        rows: list[dict[str, Any]] = [
            {"loss": "ce", "weight": weights["ce"], "student": "logits", "teacher": "labels"}
        ]
        for number, s in enumerate(reversed(self.places), 1):
            exit, place = f"exit{s} logits", self.taps.end(s)
            rows.append(
                {
                    "loss": "ce/exits",
                    "weight": weights["ce/exits"],
                    "student": exit,
                    "teacher": "labels",
                }
            )
            rows.append(
                {
                    "loss": "soft",
                    "weight": weights["soft"],
                    "student": exit,
                    "teacher": "its own logits",
                }
            )
            if number != self.exempt:
                its_own: dict[str, Any] = {
                    "student": place.name,
                    "student_shape": list(place.shape),
                    "student_layout": place.shape.layout,
                }
                its: dict[str, Any] = {
                    "teacher": self.taps.end(-1).name,
                    "teacher_shape": list(self.deepest),
                }
                its["teacher_layout"] = self.deepest.layout
                parts: dict[str, Any] = {
                    "adapter": "Exit",
                    "adapter_parameters": num_parameters(self.exits[f"exit{s}"]),
                }
                rows.append(
                    {"loss": "feature", "weight": weights["feature"], **its_own, **its, **parts}
                )
        return {
            "losses": rows,
            "parameters": {
                "student": num_parameters(self.student),
                "exits": num_parameters(self.exits),
            },
        }


def _numbers(stages: str | Sequence[int], count: int, model: str) -> list[int]:
    if count < 2:
        raise ValueError(
            f"{model} has {count} stages, and an exit stands behind one in front of the last: 2 or more"
        )
    if stages == "all":
        return list(range(1, count))
    whole = isinstance(stages, (list, tuple)) and all(
        isinstance(s, int) and 1 <= s < count for s in stages
    )
    if not whole or not stages or len(set(stages)) < len(stages):
        raise ValueError(
            f"stages={stages!r}: 'all', or different numbers from 1 to {count - 1}; behind the last of {count} stages "
            f"{model} has its own classifier"
        )
    return sorted(stages)  # type: ignore[arg-type]


@register_strategy("byot", losses=TERMS, title="Be your own teacher, BYOT (Zhang et al. 2019)")
def byot(
    given: StrategyInputs,
    *,
    temperature: float = 3.0,
    exempt: int | None = 1,
    stages: str | Sequence[int] = "all",
) -> Method:
    """temperature: no unit; exempt: exit whose feature is not compared, 1 the deepest, or None; stages: with exits."""
    options: dict[str, Any] = {"temperature": temperature, "exempt": exempt, "stages": stages}
    return BYOT(given.student, given.weights, preprocess=given.preprocess, **options)
