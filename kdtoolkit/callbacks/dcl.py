"""Deep communication learning, DCL (Zhang et al. 2022): networks exchange parts of their weights.

Rule: every T mini-batches, element by element over K networks of one architecture,
w_i <- beta w_avg + (1 - beta) w_i, with w_avg = sum_i alpha_i w_i and alpha_i ~ the product of the
others' |w_j| (small weights count more).

Differs: the rule "paper" has the authors' eps of 1e-18, which shrinks small weights at every merge
from K = 5 on; "eps-free" is its limit, "mean" the plain average. Computed without products of K
numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.callbacks.bn_recalibration import recalibrate_batch_norms, running_statistics
from kdtoolkit.core.callback import Callback, check_several_networks
from kdtoolkit.core.run_context import RunContext, RunPreview, last_step_of_epoch
from kdtoolkit.types import Clock, Step
from kdtoolkit.utils.validation import (
    check_choice,
    check_fraction,
    check_non_negative,
    check_whole_number,
)

logger = logging.getLogger(__name__)
UNITS = ("steps", "epochs")
DEFAULT_INTERVAL = 10  # steps, as in the authors' code
STATISTICS = ("own", "merged", "recalibrated")
MOMENTUM = ("own", "merged", "reset")


class DCLMerger(Callback):
    """Merges the weights of all networks of a run.

    Parameters are merged, BatchNorm's scale and shift among them; of Branches those behind the
    stage where they leave the trunk. `Diversity` measures how different the networks still are.

    Args:
        every: Mini-batches (the authors' code: 10) or epochs (the paper's text) between two merges.
        unit: Unit of `every`: "steps" or "epochs".
        beta: Share of the common weights, 0 to 1, no unit; 0 leaves every network alone.
        rule: "paper", "eps-free" or "mean"; see `functional.dcl_average`.
        eps: Of the rule "paper", from 0.
        statistics: What happens to the running means and variances of BatchNorm, which only an
            evaluation reads. "own": each network keeps its own, as in the authors' code. "merged":
            each takes `beta` of their plain mean at every merge. "recalibrated": they are found
            again at the end of every epoch, on 16 batches of training images, for the weights as
            they are then.
        momentum: What happens to the optimizer's state of a weight. "own": each network keeps its
            own, as in the authors' code. "merged": each takes `beta` of their plain mean. "reset":
            it is dropped at every merge.
        start: Share of the run, 0 to 1, from which there are merges.
        until: Share of the run, 0 to 1, up to which there are merges; an early end lets the
            networks become different again.

    Raises:
        ValueError: For an option that is not allowed.
    """

    name = "dcl"
    order = 10

    def __init__(
        self,
        every: int = DEFAULT_INTERVAL,
        *,
        unit: str = "steps",
        beta: float = 0.1,
        rule: str = "paper",
        eps: float = 1e-18,
        statistics: str = "own",
        momentum: str = "own",
        start: float = 0.0,
        until: float = 1.0,
    ) -> None:
        check_whole_number("every", every, meaning=f"{unit} between two merges")
        check_choice("unit", unit, UNITS)
        check_choice("rule", rule, functional.DCL_RULES)
        check_choice("statistics", statistics, STATISTICS)
        check_choice("momentum", momentum, MOMENTUM)
        check_non_negative("eps", eps)
        check_fraction("beta", beta, "the share of the common weights")
        check_fraction("start", start, "share of the run")
        check_fraction("until", until, "share of the run")
        if start > until:
            raise ValueError(
                f"start is {start!r} and until {until!r}; allowed: shares of the run, "
                "0 <= start <= until <= 1"
            )
        self.every, self.unit, self.beta, self.rule, self.eps = every, unit, beta, rule, eps
        self.statistics, self.momentum, self.start, self.until = statistics, momentum, start, until

    def plan_notes(self) -> list[str]:
        """When weights are merged, and how."""
        when = f"every {self.every} {self.unit}"
        when += f" from {self.start:g}" if self.start else ""
        when += f" until {self.until:g} of the run" if self.until < 1 else ""
        statistics = f"BatchNorm statistics {self.statistics}, momentum {self.momentum}"
        return [f"{when}: weights are merged, rule {self.rule}, beta {self.beta:g}, {statistics}"]

    def check(self, run: RunPreview) -> None:
        """Refuse different architectures or frozen parts, unreadable data, and no merge at all."""
        check_several_networks(self, run.method)
        _check_same_architecture(run.method.networks())
        self._check_interval(run)
        if self.statistics != "recalibrated" or run.data is None:
            return
        if run.data.train.num_rows is None or run.data.train.user_loader is not None:
            raise ValueError(
                "DCLMerger(statistics='recalibrated') reads training images apart from the batches "
                "of the run, and cannot from a stream or a DataLoader: pass a data set, or "
                "statistics='merged'"
            )

    def _check_interval(self, run: RunPreview) -> None:
        """Refuse an interval that the user chose and that is longer than the run."""
        clock = run.clock
        if clock is None or self.every == DEFAULT_INTERVAL:
            return
        if self._is_longer_than(clock, run.config.grad_accum):
            raise ValueError(self._describe_interval(clock, run.config.grad_accum))

    def _is_longer_than(self, clock: Clock, grad_accum: int) -> bool:
        return self.beta > 0 and self.every > self._num_units(clock, grad_accum)

    def _num_units(self, clock: Clock, grad_accum: int) -> int:
        """Length of a run in the unit of `every`, the last epoch whole or not."""
        per_unit = grad_accum if self.unit == "steps" else clock.steps_per_epoch
        return -(-clock.total_steps // per_unit)

    def _describe_interval(self, clock: Clock, grad_accum: int) -> str:
        return (
            f"DCLMerger merges every {self.every} {self.unit}, and the run has "
            f"{self._num_units(clock, grad_accum)}: no weights are merged; use a smaller every, or "
            "a longer run"
        )

    def on_fit_start(self, run: RunContext) -> None:
        """Say so where a short run ends before the first merge of the default interval."""
        if self._is_longer_than(run.clock, run.config.grad_accum):
            logger.warning("%s", self._describe_interval(run.clock, run.config.grad_accum))

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """Merge where it is time, also at the end of an epoch: its evaluation comes later."""
        clock, grad_accum = run.clock, run.config.grad_accum
        epoch_ends = clock.step == last_step_of_epoch(run)
        if self.unit == "steps":
            updates, rest = divmod(clock.step, grad_accum)
            due = rest == 0 and updates % self.every == 0
        else:
            due = epoch_ends and (clock.epoch + 1) % self.every == 0
        if due:
            self._merge_run(run)
        if self.statistics == "recalibrated" and self.beta > 0 and epoch_ends:
            recalibrate_batch_norms(run)

    def _merge_run(self, run: RunContext) -> None:
        if self.beta == 0 or not self.start <= run.clock.progress <= self.until:
            return
        run.method.sync(run.optimizer if self.momentum == "merged" else None)
        networks = list(run.method.networks().values())
        self.merge(networks)
        if self.momentum != "own":
            self._merge_momentum(run.optimizer, networks)

    def merge(self, nets: Sequence[nn.Module]) -> None:
        """Merge once, in place: parameters and, with `statistics="merged"`, BatchNorm's.

        Args:
            nets: K networks of one architecture.
        """
        if self.beta == 0:
            return
        parameters = _own_parameters(nets)
        merged = functional.dcl_merge(parameters, beta=self.beta, rule=self.rule, eps=self.eps)
        _copy_into(parameters, merged)
        statistics = [running_statistics(net) for net in nets]
        if self.statistics == "merged" and statistics[0]:
            _copy_into(statistics, functional.dcl_merge(statistics, beta=self.beta, rule="mean"))

    def _merge_momentum(self, optimizer: torch.optim.Optimizer, nets: Sequence[nn.Module]) -> None:
        state = getattr(optimizer, "optimizer", optimizer).state
        for same in zip(*(own.values() for own in _own_parameters(nets)), strict=True):
            if self.momentum == "reset":
                for p in same:
                    state.pop(p, None)
            elif all(p in state for p in same):
                averages = [_moving_averages(state[p], p) for p in same]
                _copy_into(averages, functional.dcl_merge(averages, beta=self.beta, rule="mean"))


def _check_same_architecture(networks: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` unless all have the same parameters, and the same ones are frozen."""
    (first, reference), *others = networks.items()
    shapes = {n: tuple(p.shape) for n, p in reference.named_parameters()}
    trained = {n for n, p in reference.named_parameters() if p.requires_grad}
    for name, net in others:
        if {n: tuple(p.shape) for n, p in net.named_parameters()} != shapes:
            raise ValueError(
                f"DCLMerger merges networks of one architecture; {name} has other parameters than "
                f"{first}: pass networks of one architecture, or leave DCLMerger out"
            )
        if {n for n, p in net.named_parameters() if p.requires_grad} != trained:
            raise ValueError(
                f"DCLMerger merges what is trained, and other parameters of {name} are frozen than "
                f"of {first}: freeze the same ones, or leave DCLMerger out"
            )


def _own_parameters(nets: Sequence[nn.Module]) -> list[dict[str, nn.Parameter]]:
    """Trained parameters of each network by name, without those of a shared trunk."""
    trained = [{n: p for n, p in net.named_parameters() if p.requires_grad} for net in nets]
    own = []
    for k, parameters in enumerate(trained):
        neighbour = trained[k - 1]  # of the first network the last
        own.append({n: p for n, p in parameters.items() if p is not neighbour[n]})
    return own


def _moving_averages(state: Mapping[str, object], p: nn.Parameter) -> dict[str, Tensor]:
    """Entries of an optimizer's state that are averages of the gradient, and not counters."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape}
    return {k: v for k, v in tensors.items() if v.dim() > 0 and v.is_floating_point()}


@torch.no_grad()
def _copy_into(
    tensors: Sequence[Mapping[str, Tensor]], values: Sequence[Mapping[str, Tensor]]
) -> None:
    for own, new in zip(tensors, values, strict=True):
        for key, tensor in own.items():
            tensor.copy_(new[key])
