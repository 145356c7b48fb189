"""How different the networks of a run still are, and a word when they have become one.

Networks that merge weights (DCL) or share a trunk and teach each other (PCL) can become copies: then they have nothing
to tell each other, and knowledge losses push nothing. Shao and Chen 2023 (DKEL) call it homogenization and collapse.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.callback import Callback
from kdtoolkit.types import Batch, Step
from kdtoolkit.utils import distributed

WINDOW = 10  # batches at the end of an epoch that are looked at
LEAST_KNOWLEDGE = 0.01  # of the cross-entropy
LEAST_DISAGREEMENT = 0.5  # percent
CLEAR_DISAGREEMENT = (
    5.0  # percent; logits that have learned little are near each other, and may still differ
)
ERRORS = 5.0  # percent; networks that make fewer agree because they are right


class HomogeneityWarning(UserWarning):
    """The networks of a run have become one."""


class Diversity(Callback):
    """Writes "diversity" rows of metrics.jsonl, and warns once when two of them in a row tell of copies.

    every  epochs between two rows
    after  batches before which nothing is judged: networks that have learned nothing are alike, too

    A row holds `weights`, the relative distance of the weights (mean over pairs of |w_i - w_j| / |w|; left out for
    several architectures), `disagreement`, the share of images of the epoch's last ten batches on which two networks
    name different classes, in percent, and `knowledge`, the KL divergence between two networks over their
    cross-entropy (mean over pairs; no temperature, no weight, no unit). With an EMATeacher `ema/...` are the same
    between a network and the averages of the others; with one network its own.

    Copies are networks that disagree on less than 0.5 % of the images while they are wrong on more than 5 %, or, also
    towards the EMA of others, on less than 5 % with a knowledge below 1 %.
    """

    name = "diversity"

    def __init__(self, every: int = 1, *, after: int = 200):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}: a whole number of epochs from 1")
        if after < 0:
            raise ValueError(f"after is {after!r}: a number of batches from 0")
        self.every, self.after = every, after
        self._new()

    def _new(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count, self.alike, self.warned = 0, 0, False

    def check(self, run: Any) -> None:
        if len(run.method.networks()) < 2 and not any(
            isinstance(c, EMATeacher) for c in run.callbacks
        ):
            raise ValueError(
                "Diversity compares two networks or more, or one with its EMATeacher; this run trains one"
            )

    def on_fit_start(self, run: Any) -> None:
        if run.clock.step == 0:
            self._new()
        self.teacher = next((c for c in run.callbacks if isinstance(c, EMATeacher)), None)

    def on_losses(self, run: Any, step: Step, batch: Batch) -> None:
        end = min(run.clock.total_steps, run.epoch_start + run.clock.steps_per_epoch)
        if (run.clock.epoch + 1) % self.every or run.clock.step < end - WINDOW:
            return
        students = [step.logits[name].detach() for name in run.method.networks()]
        found = measured(students, batch["y"]) if len(students) > 1 else {}
        teachers = None if self.teacher is None else self.teacher.known(run)
        if teachers is not None:
            found |= {
                f"ema/{k}": v
                for k, v in measured(students, batch["y"], list(teachers.values())).items()
            }
        self.sums = {
            k: v + self.sums[k].to(v.device) if k in self.sums else v for k, v in found.items()
        }
        self.count += 1

    def on_epoch_end(self, run: Any, metrics: dict[str, float]) -> None:
        if not self.count:
            return
        share = 1 / (self.count * distributed.world_size())
        means = {
            k: float(distributed.all_reduce_sum(v.clone()) * share) for k, v in self.sums.items()
        }
        run.method.sync()
        nets = list(run.method.networks().values())
        row = _row(means, "", nets)
        if self.teacher is not None:
            self.teacher.sync()
            row |= _row(means, "ema/", nets, list(self.teacher.networks().values()))
        run.metrics_log.add(event="diversity", epoch=run.clock.epoch, step=run.clock.step, **row)
        self.sums, self.count = {}, 0
        self._judge(run, row, means)

    def _judge(self, run: Any, row: dict[str, float], means: dict[str, float]) -> None:
        others = ["", "ema/"] if len(run.method.networks()) > 1 else []
        wrong = means.get("errors", 0.0) > ERRORS
        alike = wrong and row.get("disagreement", 100.0) < LEAST_DISAGREEMENT
        for where in others:
            near = row.get(f"{where}knowledge", 1.0) < LEAST_KNOWLEDGE
            alike = alike or (near and row[f"{where}disagreement"] < CLEAR_DISAGREEMENT)
        self.alike = self.alike + 1 if alike and run.clock.step > self.after else 0
        if self.alike < 2 or self.warned:
            return
        self.warned = True
        if run.accelerator.is_main_process:
            told = ", ".join(f"{k} {v:.2g}" for k, v in row.items())
            warnings.warn(
                f"epoch {run.clock.epoch}: the networks of this run have become one ({told}): they have nothing to "
                "teach each other. Merge less (DCLMerger's every, beta, until), give each a view of its own "
                "(views=True), other first weights or another architecture, or raise the weights of what joins them "
                "later",
                HomogeneityWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        sums = {k: v.cpu() for k, v in self.sums.items()}
        return {"sums": sums, "count": self.count, "alike": self.alike, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
        self.alike, self.warned = state["alike"], state["warned"]


@torch.no_grad()
def measured(
    students: Sequence[Tensor], labels: Tensor, teachers: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Numbers of one batch, scalar tensors: disagreement and errors in percent, kl and ce. Means over pairs of networks
    (B, C), or with `teachers` over pairs of a network and the teacher of another (of one network its own)."""
    rows, numbers = students if teachers is None else teachers, range(len(students))
    pairs = [(i, j) for i in numbers for j in numbers if i != j] or [(0, 0)]
    known = labels >= 0  # those without a label are -1
    count = known.sum().clamp(min=1)
    apart = [(students[i].argmax(1) != rows[j].argmax(1)).float().mean() for i, j in pairs]
    soft = [functional.kd(students[i], rows[j], temperature=1.0) for i, j in pairs]
    wrong = [((z.argmax(1) != labels) & known).sum() / count for z in students]
    targets = labels.where(known, -100)
    hard = [
        F.cross_entropy(z.float(), targets, ignore_index=-100, reduction="sum") / count
        for z in students
    ]
    percent = {
        "disagreement": 100 * torch.stack(apart).mean(),
        "errors": 100 * torch.stack(wrong).mean(),
    }
    return percent | {"kl": torch.stack(soft).mean(), "ce": torch.stack(hard).mean()}


def _row(
    means: dict[str, float],
    prefix: str,
    nets: list[nn.Module],
    teachers: list[nn.Module] | None = None,
) -> dict[str, float]:
    if f"{prefix}kl" not in means:
        return {}
    row = {f"{prefix}disagreement": means[f"{prefix}disagreement"]}
    if means[f"{prefix}ce"] > 0:
        row[f"{prefix}knowledge"] = means[f"{prefix}kl"] / means[f"{prefix}ce"]
    if teachers is not None:
        each = [distance([net, its]) for net, its in zip(nets, teachers, strict=True)]
        return {f"{prefix}weights": sum(each) / len(each)} | row
    return ({"weights": distance(nets)} if same_architecture(nets) else {}) | row


def same_architecture(nets: Sequence[nn.Module]) -> bool:
    """Whether all have parameters of the same names and shapes."""
    return len({tuple((n, tuple(p.shape)) for n, p in net.named_parameters()) for net in nets}) == 1


@torch.no_grad()
def distance(nets: Sequence[nn.Module]) -> float:
    """Mean over pairs of networks of the norm of their difference over the norm of the weights; no unit."""
    flat = [torch.cat([p.detach().float().flatten() for p in net.parameters()]) for net in nets]
    size = sum(w.norm() for w in flat) / len(flat)
    pairs = list(combinations(flat, 2))
    return float(sum((a - b).norm() for a, b in pairs) / len(pairs) / size)
