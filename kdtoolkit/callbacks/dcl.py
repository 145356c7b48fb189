"""Deep communication learning, DCL (Zhang et al. 2022): networks of one architecture exchange parts of their weights.

Rule     every T mini-batches, element by element over K networks: w_i <- beta w_avg + (1 - beta) w_i,
         w_avg = sum_i alpha_i w_i, alpha_i ~ the product of the others' |w_j| (small weights count more)
Differs  "paper" has the authors' eps of 1e-18, which shrinks small weights at every merge from K = 5 on; "eps-free" is
         its limit, "mean" the plain average. Computed without products of K numbers
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..types import Step
from .base import Callback

UNITS = ("steps", "epochs")


class DCLMerger(Callback):
    """Merges the weights of all networks of a run, and logs how different they still are.

    every  mini-batches (the authors' code: 10) or epochs (the paper's text) between two exchanges
    unit   "steps" or "epochs"
    beta   share of the common weights, 0 to 1, no unit; 0 leaves every network alone
    rule   "paper", "eps-free" or "mean"
    eps    of the rule "paper"

    Parameters are merged, BatchNorm's scale and shift among them. BatchNorm statistics and the optimizer's momentum
    stay each network's own, as in the authors' code. "diversity" rows of metrics.jsonl hold, at the end of every epoch,
    the relative distance of the weights (mean over pairs of |w_i - w_j| / |w|) and the share of images of the last
    batch on which two networks disagree, in percent.
    """

    name = "dcl"

    def __init__(
        self, every: int = 10, *, unit: str = "steps", beta: float = 0.1, rule: str = "paper", eps: float = 1e-18
    ):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}: a whole number of {unit} from 1")
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}; allowed: {', '.join(map(repr, UNITS))}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta!r}: the share of the common weights, from 0 to 1")
        if rule not in functional.DCL_RULES:
            raise ValueError(f"rule is {rule!r}; allowed: {', '.join(map(repr, functional.DCL_RULES))}")
        self.every, self.unit, self.beta, self.rule, self.eps = every, unit, beta, rule, eps
        self._logits: list[Tensor] = []  # of the last batch

    def on_fit_start(self, run: Any) -> None:
        nets = list(run.method.networks().values())
        if len(nets) < 2:
            raise ValueError(f"DCLMerger needs two networks or more, this run trains {len(nets)}: use Peers([...])")
        shapes = [{n: tuple(p.shape) for n, p in net.named_parameters()} for net in nets]
        other = next((k for k, s in enumerate(shapes) if s != shapes[0]), None)
        if other is not None:
            names = list(run.method.networks())
            raise ValueError(
                f"DCLMerger merges networks of one architecture; {names[other]} has other parameters than {names[0]}"
            )

    def on_step_end(self, run: Any, step: Step) -> None:
        self._logits = [z.detach() for z in step.logits.values()]
        accumulated = run.clock.step % run.settings.grad_accum == 0
        if self.unit == "steps" and accumulated and (run.clock.step // run.settings.grad_accum) % self.every == 0:
            self.merge(list(run.method.networks().values()))

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        nets = list(run.method.networks().values())
        row = {"weights": distance(nets), "disagreement": disagreement(self._logits)}
        run.journal.add(event="diversity", epoch=run.clock.epoch, step=run.clock.step, **row)
        if self.unit == "epochs" and run.clock.epoch % self.every == 0:
            self.merge(nets)

    def merge(self, nets: list[nn.Module]) -> None:
        """One exchange, in place."""
        if self.beta == 0:
            return
        parameters = [dict(net.named_parameters()) for net in nets]
        merged = functional.dcl_merge(parameters, beta=self.beta, rule=self.rule, eps=self.eps)
        with torch.no_grad():
            for own, new in zip(parameters, merged, strict=True):
                for key, tensor in own.items():
                    tensor.copy_(new[key])


@torch.no_grad()
def distance(nets: list[nn.Module]) -> float:
    """Mean over pairs of networks of the norm of their difference over the norm of the weights; no unit."""
    flat = [torch.cat([p.detach().float().flatten() for p in net.parameters()]) for net in nets]
    size = sum(w.norm() for w in flat) / len(flat)
    pairs = list(combinations(flat, 2))
    return float(sum((a - b).norm() for a, b in pairs) / len(pairs) / size)


@torch.no_grad()
def disagreement(logits: list[Tensor]) -> float:
    """Share of a batch on which two networks name different classes, mean over pairs, percent."""
    answers = [z.argmax(1) for z in logits]
    pairs = list(combinations(answers, 2))
    return float(100 * sum((a != b).float().mean() for a, b in pairs) / len(pairs))
