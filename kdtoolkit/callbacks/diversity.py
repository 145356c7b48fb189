"""How different the networks of a run still are, and a warning when they have collapsed.

Networks that merge weights (DCL) or share a trunk and teach each other (PCL) can become copies of
each other. Copies cannot teach each other anything, and losses between them change nothing. Shao
and Chen 2023 (DKEL) call it homogenization and collapse.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdtoolkit.callbacks.diversity_measures import (
    have_same_architecture,
    measure_batch,
    weight_distance,
)
from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext, RunPreview, last_step_of_epoch
from kdtoolkit.types import Batch, Step
from kdtoolkit.utils import distributed
from kdtoolkit.utils.validation import check_whole_number

NUM_BATCHES = 10  # at the end of an epoch, which are measured
MIN_KNOWLEDGE = 0.01  # KL over cross-entropy, no unit
MIN_DISAGREEMENT = 0.5  # percent
CLEAR_DISAGREEMENT = 5.0  # percent; early in training, logits are similar and classes still differ
MAX_ERRORS_OF_GOOD_NETWORKS = 5.0  # percent; such networks agree because they are right


class CollapseWarning(UserWarning):
    """The networks of a run have become copies of each other."""


class Diversity(Callback):
    """Writes "diversity" rows of metrics.jsonl, and warns once if the networks have collapsed.

    A row holds `weights`, the relative distance of the weights (mean over pairs of
    |w_i - w_j| / |w|; left out for several architectures); `disagreement`, the share of images of
    the epoch's last ten batches on which two networks name different classes, in percent; and
    `knowledge`, the KL divergence between two networks over their cross-entropy (mean over pairs;
    no temperature, no weight, no unit). With an EMATeacher, `ema/...` are the same between a
    network and the averages of the others; with one network its own.

    Of networks with batches of their own (`Method.own_batches`) a row holds `weights` alone, as
    logits of different images cannot be compared, and there is no warning.

    Networks have collapsed when, in two rows in a row, they disagree on less than 0.5 % of the
    images while they are wrong on more than 5 %, or, also towards the EMA of others, on less than
    5 % with a knowledge below 1 %.

    Args:
        every: Epochs between two rows.
        after: Batches before which nothing is judged: networks that have learned nothing are
            similar, too.
    """

    name = "diversity"

    def __init__(self, every: int = 1, *, after: int = 200) -> None:
        check_whole_number("every", every, meaning="epochs between two rows")
        check_whole_number("after", after, minimum=0, meaning="batches")
        self.every, self.after = every, after
        self.teacher: EMATeacher | None = None
        self._forget()

    def _forget(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count, self.collapsed_rows, self.warned = 0, 0, False

    def check(self, run: RunPreview) -> None:
        """Refuse a single network without an EMATeacher."""
        has_teacher = any(isinstance(c, EMATeacher) for c in run.callbacks)
        if len(run.method.networks()) < 2 and not has_teacher:
            raise ValueError(
                "Diversity compares two networks or more, or one with its EMATeacher, and this run "
                "trains one: leave it out"
            )

    def on_fit_start(self, run: RunContext) -> None:
        """Find the EMATeacher of the run, and forget an earlier run."""
        if run.clock.step == 0:
            self._forget()
        self.teacher = next((c for c in run.callbacks if isinstance(c, EMATeacher)), None)

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> None:
        """Measure the last batches of an epoch."""
        is_early = run.clock.step < last_step_of_epoch(run) - NUM_BATCHES
        if (run.clock.epoch + 1) % self.every or is_early:
            return
        if run.method.own_batches:  # logits of other images cannot be compared
            self.count += 1
            return
        students = [step.logits[name].detach() for name in run.method.networks()]
        found = measure_batch(students, batch["y"]) if len(students) > 1 else {}
        teachers = None if self.teacher is None else self.teacher.cached_logits(run)
        if teachers is not None:
            towards_ema = measure_batch(students, batch["y"], list(teachers.values()))
            found |= {f"ema/{key}": value for key, value in towards_ema.items()}
        before = self.sums
        self.sums = {k: v + before[k].to(v.device) if k in before else v for k, v in found.items()}
        self.count += 1

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """Write the row of the epoch, and warn."""
        if not self.count:
            return
        share = 1 / (self.count * distributed.world_size())
        means = {
            k: float(distributed.all_reduce_sum(v.clone()) * share) for k, v in self.sums.items()
        }
        run.method.sync()
        nets = list(run.method.networks().values())
        row = _row_of_peers(means, nets)
        if self.teacher is not None:
            self.teacher.sync()
            row |= _row_of_teachers(means, nets, list(self.teacher.networks().values()))
        run.metrics_log.add(event="diversity", epoch=run.clock.epoch, step=run.clock.step, **row)
        self.sums, self.count = {}, 0
        collapsed = len(nets) > 1 and _have_same_logits(row)
        collapsed = collapsed or _agree_on_errors(row, means)
        counts = collapsed and run.clock.step > self.after
        self.collapsed_rows = self.collapsed_rows + 1 if counts else 0
        if self.collapsed_rows >= 2 and not self.warned:
            self.warned = True
            if run.accelerator.is_main_process:
                _warn(run.clock.epoch, row)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the epoch so far, and what was judged."""
        sums = {k: v.cpu() for k, v in self.sums.items()}
        return {
            "sums": sums,
            "count": self.count,
            "alike": self.collapsed_rows,
            "warned": self.warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.sums, self.count = dict(state["sums"]), state["count"]
        self.collapsed_rows, self.warned = state["alike"], state["warned"]


def _agree_on_errors(row: Mapping[str, float], means: Mapping[str, float]) -> bool:
    """Whether the networks name the same classes, and not because they are right."""
    wrong = means.get("errors", 0.0) > MAX_ERRORS_OF_GOOD_NETWORKS
    return wrong and row.get("disagreement", 100.0) < MIN_DISAGREEMENT


def _have_same_logits(row: Mapping[str, float]) -> bool:
    """Whether peers, or a network and the averages of the others, have the same logits."""
    for prefix in ("", "ema/"):
        if row.get(f"{prefix}knowledge", 1.0) >= MIN_KNOWLEDGE:
            continue
        if row[f"{prefix}disagreement"] < CLEAR_DISAGREEMENT:
            return True
    return False


def _warn(epoch: int, row: Mapping[str, float]) -> None:
    numbers = ", ".join(f"{k} {v:.2g}" for k, v in row.items())
    warnings.warn(
        f"epoch {epoch}: the peers have collapsed ({numbers}): they are copies of each other, and "
        "losses between them change nothing. Merge less (DCLMerger's every, beta, until), give "
        "each a view of its own (views=True), other first weights or another architecture, or "
        "raise the weights of the losses between them later",
        CollapseWarning,
        stacklevel=3,
    )


def _row_of_peers(means: Mapping[str, float], nets: Sequence[nn.Module]) -> dict[str, float]:
    several = len(nets) > 1 and have_same_architecture(nets)
    weights = {"weights": weight_distance(nets)} if several else {}
    return weights | _numbers(means, "") if "kl" in means else weights


def _row_of_teachers(
    means: Mapping[str, float], nets: Sequence[nn.Module], teachers: Sequence[nn.Module]
) -> dict[str, float]:
    if "ema/kl" not in means:
        return {}
    each = [weight_distance(pair) for pair in zip(nets, teachers, strict=True)]
    return {"ema/weights": sum(each) / len(each)} | _numbers(means, "ema/")


def _numbers(means: Mapping[str, float], prefix: str) -> dict[str, float]:
    numbers = {f"{prefix}disagreement": means[f"{prefix}disagreement"]}
    if means[f"{prefix}ce"] > 0:
        numbers[f"{prefix}knowledge"] = means[f"{prefix}kl"] / means[f"{prefix}ce"]
    return numbers
