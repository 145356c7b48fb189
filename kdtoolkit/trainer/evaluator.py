"""Numbers of networks over whole splits, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.method import Method
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.metrics.classification import ECE, Agreement, CrossEntropy, Top1, Top5
from kdtoolkit.metrics.counting import Meter
from kdtoolkit.types import Batch
from kdtoolkit.utils import distributed

LEAST_BATCH = 256  # images


class Evaluator:
    """Evaluates the networks of a method and of callbacks, their ensembles, and the method's teachers.

    teacher_metrics  {"teacher/test": numbers, "teacher/1/val": ...}, filled by `teachers`
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        accelerator: Accelerator,
        finish: Callable[[Any, bool], Batch],
        batch_size: int,
        callbacks: Sequence[Callback] = (),
    ):
        self.callbacks = callbacks
        self.method, self.data, self.accelerator, self.finish = method, data, accelerator, finish
        self.batch_size = max(batch_size, LEAST_BATCH)
        self.teacher_metrics: dict[str, dict[str, float]] = {}
        self._last: dict[str, tuple[Tensor, dict[str, dict[str, float]]]] = {}  # by split
        self._answers: dict[
            str, list[Tensor]
        ] = {}  # of the first teacher, by split: (B,) class ids of each batch

    @torch.no_grad()
    def networks(self, split: Split) -> dict[str, dict[str, float]]:
        """{network: top1, top5, loss, ece, agreement with the first teacher} over one split, and of "ensemble" where
        there are several networks: the method's own, else the mean of their probabilities.

        Weights that are still those of the last evaluation of this split give its numbers again, unmeasured.
        """
        self.method.sync()
        kept = [net for callback in self.callbacks for net in callback.networks().values()]
        for callback in self.callbacks:
            callback.sync()
        for module in (self.method, *kept):
            distributed.broadcast_buffers(module)
        mark, last = (
            torch.cat([_mark(module) for module in (self.method, *kept)]),
            self._last.get(split.name),
        )
        if last is not None and torch.equal(last[0], mark):
            return {name: dict(row) for name, row in last[1].items()}
        self.method.eval()
        answers = self._answers.get(split.name)
        empty = torch.zeros(1, 3, *self.data.image_size, device=self.accelerator.device)
        with (
            self.accelerator.autocast()
        ):  # every rank meters the same networks, also one that gets no batch
            meters = {
                n: Meter([Top1(), Top5(), CrossEntropy(), ECE(), Agreement()])
                for n in self._predict(empty)
            }
        for number, batch in enumerate(self.batches(split)):
            with self.accelerator.autocast():
                found = self._predict(batch["x"])
                if answers is not None:
                    teacher: Tensor | None = answers[number]
                else:
                    teacher = self._ask(0, batch).argmax(1) if self._scored(0) else None
            for name, logits in found.items():
                meters[name].add(logits.float(), batch["y"], teacher=teacher)
        self.method.train()
        rows = {name: meter.compute() for name, meter in meters.items()}
        self._last[split.name] = mark, rows
        return {name: dict(row) for name, row in rows.items()}

    def _predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every network; those of an ensemble are the logarithm of the mean probability."""
        found = _with_ensemble(self.method.predict(x), "ensemble")
        for callback in self.callbacks:
            found |= _with_ensemble(callback.predict(x), f"{callback.name}/ensemble")
        return found

    @torch.no_grad()
    def teachers(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """(name, split, numbers) of each teacher on the test and the validation split."""
        for number in range(len(self.method.teachers)):
            for split in (self.data.test, self.data.val):
                if split is None or not self._scored(number):
                    continue
                meter, answers = Meter([Top1(), Top5(), CrossEntropy(), ECE()]), []
                for batch in self.batches(split):
                    with self.accelerator.autocast():
                        logits = self._ask(number, batch)
                    meter.add(logits.float(), batch["y"])
                    answers.append(logits.argmax(1))
                if number == 0 and _in_order(split):
                    self._answers[split.name] = answers
                name = "teacher" if number == 0 else f"teacher/{number}"
                self.teacher_metrics[f"{name}/{split.name}"] = row = meter.compute()
                yield name, split.name, row

    def batches(self, split: Split) -> Iterator[Batch]:
        accelerator, size = self.accelerator, self.batch_size
        loader = prepare_data_loader(
            split.loader(size - size % accelerator.num_processes),
            accelerator.device,
            accelerator.num_processes,
            accelerator.process_index,
            split_batches=True,
            put_on_device=True,
            even_batches=False,
        )
        for batch in loader:
            yield self.finish(batch, False)

    def _scored(self, number: int) -> bool:
        return number < len(self.method.teachers) and getattr(
            self.method.teachers[number], "scored", True
        )

    def _ask(self, number: int, batch: Batch) -> Tensor:
        return self.method.teachers[number](batch["x"]).logits


def _with_ensemble(answers: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    if len(answers) < 2 or name in answers:
        return answers
    mean = torch.stack([z.float().softmax(1) for z in answers.values()]).mean(0)
    return answers | {name: mean.log()}


def _mark(module: nn.Module) -> Tensor:
    """Two sums of each weight and buffer, (N, 2): other weights have others."""
    states = (v.detach().double() for v in module.state_dict().values() if v.numel())
    return torch.stack([torch.stack([v.sum(), v.square().sum()]) for v in states])


def _in_order(split: Split) -> bool:
    """Whether a second reading gives the same batches; a user's DataLoader may shuffle."""
    return split.own_loader is None or type(split.own_loader.sampler) is SequentialSampler
