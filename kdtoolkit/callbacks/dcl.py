"""Deep communication learning, DCL (Zhang et al. 2022): networks of one architecture exchange parts of their weights.

Rule     every T mini-batches, element by element over K networks: w_i <- beta w_avg + (1 - beta) w_i,
         w_avg = sum_i alpha_i w_i, alpha_i ~ the product of the others' |w_j| (small weights count more)
Differs  "paper" has the authors' eps of 1e-18, which shrinks small weights at every merge from K = 5 on; "eps-free" is
         its limit, "mean" the plain average. Computed without products of K numbers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback, check_several_networks
from kdtoolkit.types import Step
from kdtoolkit.utils.state import preserve_random_state
from kdtoolkit.utils.validation import check_choice

UNITS = ("steps", "epochs")
STATISTICS = ("own", "merged", "recalibrated")
MOMENTUM = ("own", "merged", "reset")
RECALIBRATION = 16  # batches


class DCLMerger(Callback):
    """Merges the weights of all networks of a run. Diversity tells how different they still are.

    every       mini-batches (the authors' code: 10) or epochs (the paper's text) between two exchanges
    unit        "steps" or "epochs"
    beta        share of the common weights, 0 to 1, no unit; 0 leaves every network alone
    rule        "paper", "eps-free" or "mean"
    eps         of the rule "paper"
    statistics  BatchNorm's running means and variances, which only an evaluation reads: "own" of each network, as in
                the authors' code; "merged": each takes `beta` of their plain mean at every exchange; "recalibrated":
                found anew at the end of every epoch, on 16 batches of training images, for the weights as they are then
    momentum    what the optimizer keeps of a weight: "own", as in the authors' code; "merged": each takes `beta` of
                their plain mean; "reset": forgotten at every exchange
    start,      shares of the run, 0 to 1, between which there are exchanges: an early end lets the networks grow
    until       apart again

    Parameters are merged, BatchNorm's scale and shift among them; of Branches those behind the cut.
    """

    name = "dcl"
    order = 10

    def __init__(
        self,
        every: int = 10,
        *,
        unit: str = "steps",
        beta: float = 0.1,
        rule: str = "paper",
        eps: float = 1e-18,
        statistics: str = "own",
        momentum: str = "own",
        start: float = 0.0,
        until: float = 1.0,
    ):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}: a whole number of {unit} from 1")
        check_choice("unit", unit, UNITS)
        check_choice("rule", rule, functional.DCL_RULES)
        check_choice("statistics", statistics, STATISTICS)
        check_choice("momentum", momentum, MOMENTUM)
        functional.parameter_updates.check_rule(rule, eps)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta!r}: the share of the common weights, from 0 to 1")
        if not 0 <= start <= until <= 1:
            raise ValueError(
                f"start is {start!r} and until {until!r}: shares of the run, 0 <= start <= until <= 1"
            )
        self.every, self.unit, self.beta, self.rule, self.eps = every, unit, beta, rule, eps
        self.statistics, self.momentum, self.start, self.until = statistics, momentum, start, until

    def plan_notes(self) -> list[str]:
        when = f"every {self.every} {self.unit}" + (f" from {self.start:g}" if self.start else "")
        when += f" until {self.until:g} of the run" if self.until < 1 else ""
        statistics = f"BatchNorm statistics {self.statistics}, momentum {self.momentum}"
        return [f"{when}: weights are merged, rule {self.rule}, beta {self.beta:g}, {statistics}"]

    def check(self, run: Any) -> None:
        names, nets = list(run.method.networks()), list(run.method.networks().values())
        check_several_networks(self, run.method)
        shapes = [{n: tuple(p.shape) for n, p in net.named_parameters()} for net in nets]
        other = next((k for k, s in enumerate(shapes) if s != shapes[0]), None)
        if other is not None:
            raise ValueError(
                f"DCLMerger merges networks of one architecture; {names[other]} has other parameters than {names[0]}"
            )
        trained = [{n for n, p in net.named_parameters() if p.requires_grad} for net in nets]
        other = next((k for k, names_ in enumerate(trained) if names_ != trained[0]), None)
        if other is not None:
            raise ValueError(
                f"DCLMerger merges what is trained, and other parameters of {names[other]} are frozen than of "
                f"{names[0]}: freeze the same ones, or leave DCLMerger out"
            )
        own = run.data is not None and (
            run.data.train.len is None or run.data.train.own_loader is not None
        )
        if self.statistics == "recalibrated" and own:
            raise ValueError(
                "DCLMerger(statistics='recalibrated') reads training images apart from the run's own batches: pass a "
                "data set in place of a stream or a DataLoader, or statistics='merged'"
            )

    def on_step_end(self, run: Any, step: Step) -> None:
        """Also the exchange at the end of an epoch is made here, in front of its evaluation."""
        clock, accum = run.clock, run.config.grad_accum
        ended = clock.step == min(clock.total_steps, run.epoch_start + clock.steps_per_epoch)
        if self.unit == "steps":
            due = clock.step % accum == 0 and (clock.step // accum) % self.every == 0
        else:
            due = ended and (clock.epoch + 1) % self.every == 0
        if due:
            self._exchange(run)
        if self.statistics == "recalibrated" and self.beta > 0 and ended:
            _recalibrate(run)

    def _exchange(self, run: Any) -> None:
        if self.beta == 0 or not self.start <= run.clock.progress <= self.until:
            return
        run.method.sync(run.optimizer if self.momentum == "merged" else None)
        nets = list(run.method.networks().values())
        self.merge(nets)
        if self.momentum != "own":
            self._merge_momentum(run.optimizer, nets)

    def merge(self, nets: Sequence[nn.Module]) -> None:
        """One exchange, in place: parameters and, with statistics="merged", BatchNorm's."""
        if self.beta == 0:
            return
        parameters = _own(nets)
        _write(
            parameters,
            functional.dcl_merge(parameters, beta=self.beta, rule=self.rule, eps=self.eps),
        )
        kept = [_statistics(net) for net in nets]
        if self.statistics == "merged" and kept[0]:
            _write(kept, functional.dcl_merge(kept, beta=self.beta, rule="mean"))

    def _merge_momentum(self, optimizer: Any, nets: Sequence[nn.Module]) -> None:
        state = getattr(optimizer, "optimizer", optimizer).state
        for together in zip(*(own.values() for own in _own(nets)), strict=True):
            if self.momentum == "reset":
                for p in together:
                    state.pop(p, None)
            elif all(p in state for p in together):
                kept = [{k: v for k, v in state[p].items() if _averaged(v, p)} for p in together]
                _write(kept, functional.dcl_merge(kept, beta=self.beta, rule="mean"))


def _own(nets: Sequence[nn.Module]) -> list[dict[str, nn.Parameter]]:
    """Trained parameters by name that each network has for itself; those of a shared trunk are one already."""
    each = [{n: p for n, p in net.named_parameters() if p.requires_grad} for net in nets]
    return [{n: p for n, p in own.items() if p is not each[k - 1][n]} for k, own in enumerate(each)]


def _averaged(value: Any, p: nn.Parameter) -> bool:
    """Whether an entry of an optimizer's state is a moving average of the gradient, and not a counter."""
    return (
        isinstance(value, Tensor)
        and value.shape == p.shape
        and value.dim() > 0
        and value.is_floating_point()
    )


@torch.no_grad()
def _write(tensors: Sequence[Mapping[str, Tensor]], new: Sequence[Mapping[str, Tensor]]) -> None:
    for own, merged in zip(tensors, new, strict=True):
        for key, tensor in own.items():
            tensor.copy_(merged[key])


def _norms(net: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return (
        (n, m)
        for n, m in net.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    )


def _statistics(net: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name; no counters."""
    return {
        f"{n}.{k}": getattr(m, k) for n, m in _norms(net) for k in ("running_mean", "running_var")
    }


@torch.no_grad()
def _recalibrate(run: Any) -> None:
    """BatchNorm's statistics of all networks: plain means over batches drawn by seed and epoch alone, in train mode.
    Counters, dropout and order of data of the run stay as they were; frozen BatchNorms too."""
    norms = [m for net in run.method.networks().values() for _, m in _norms(net) if m.training]
    before = [
        (m, m.momentum, m.num_batches_tracked.clone())
        for m in norms
        if m.num_batches_tracked is not None
    ]
    with preserve_random_state(), run.accelerator.autocast():
        run.seed_step(run.clock.epoch, -2)
        split = dataclasses.replace(run.data.train, num_workers=0)
        batches = islice(
            split.loader(run.config.batch_size, shuffle=True, drop_last=True), RECALIBRATION
        )
        for m, _, _ in before:
            m.reset_running_stats()
            m.momentum = None
        for batch in batches:
            moved = {
                k: v.to(run.accelerator.device) if isinstance(v, Tensor) else v
                for k, v in batch.items()
            }
            run.method.train_logits(run.prepare_batch(moved, train=True))
    for m, momentum, counter in before:
        m.momentum = momentum
        if m.num_batches_tracked is not None:
            m.num_batches_tracked.copy_(counter)
