"""Numbers of networks over whole splits, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import SequentialSampler

from . import distributed
from .data import Data, Split
from .method import Method
from .metrics import ECE, Agreement, CrossEntropy, Meter, Top1, Top5
from .types import Batch

LEAST_BATCH = 256  # images


class Evaluator:
    """Evaluates the networks of a method and its teachers.

    teacher_metrics  {"teacher/test": numbers, "teacher/1/val": ...}, filled by `teachers`
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        accelerator: Accelerator,
        finish: Callable[[Any, bool], Batch],
        batch_size: int,
    ):
        self.method, self.data, self.accelerator, self.finish = method, data, accelerator, finish
        self.batch_size = max(batch_size, LEAST_BATCH)
        self.teacher_metrics: dict[str, dict[str, float]] = {}
        self._last: dict[tuple[str, str], tuple[Tensor, dict[str, float]]] = {}  # by split and network
        self._answers: dict[str, list[Tensor]] = {}  # of the first teacher, by split: (B,) class ids of each batch

    @torch.no_grad()
    def student(self, split: Split, network: str) -> dict[str, float]:
        """top1, top5, loss, ece, and agreement with the first teacher, of one network over one split.

        Weights that are still those of the last evaluation of this split give its numbers again, unmeasured.
        """
        distributed.share_buffers(self.method)
        mark, last = _mark(self.method), self._last.get((split.name, network))
        if last is not None and torch.equal(last[0], mark):
            return dict(last[1])
        self.method.eval()
        answers = self._answers.get(split.name)
        meter = Meter([Top1(), Top5(), CrossEntropy(), ECE(), Agreement()])
        for number, batch in enumerate(self.batches(split)):
            with self.accelerator.autocast():
                logits = self.method.logits(network, batch["x"])
                if answers is not None:
                    teacher: Tensor | None = answers[number]
                else:
                    teacher = self._ask(0, batch).argmax(1) if self._scored(0) else None
            meter.add(logits.float(), batch["y"], teacher=teacher)
        self.method.train()
        row = meter.compute()
        self._last[split.name, network] = mark, row
        return dict(row)

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
        return number < len(self.method.teachers) and getattr(self.method.teachers[number], "scored", True)

    def _ask(self, number: int, batch: Batch) -> Tensor:
        return self.method.teachers[number](batch["x"]).logits


def _mark(method: Method) -> Tensor:
    """Two sums of each weight and buffer, (N, 2): other weights have others."""
    states = (v.detach().double() for v in method.state_dict().values() if v.numel())
    return torch.stack([torch.stack([v.sum(), v.square().sum()]) for v in states])


def _in_order(split: Split) -> bool:
    """Whether a second reading gives the same batches; a user's DataLoader may shuffle."""
    return split.own_loader is None or type(split.own_loader.sampler) is SequentialSampler
