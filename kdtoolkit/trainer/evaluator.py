"""Metrics of networks over whole splits, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.method import Method
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.types import Batch
from kdtoolkit.utils import distributed

if TYPE_CHECKING:
    from kdtoolkit.metrics.chance import ChanceLevel
    from kdtoolkit.metrics.counting import CountingMetric
    from kdtoolkit.metrics.meter import Meter

MIN_BATCH_SIZE = 256  # images over all ranks
ENSEMBLE = "ensemble"
TOP5 = 5  # classes among which any label is one of the five

Metrics = dict[str, float]  # "top1", "top5", "ece", "agreement": percent; "loss": nats


class Evaluator:
    """Evaluates the networks of a method and of callbacks, ensembles, and teachers.

    Args:
        method: Its networks and teachers are evaluated.
        data: Splits and image size.
        accelerator: Device, autocast and ranks.
        prepare_batch: `(raw batch, train) -> Batch`, images in [0, 1].
        batch_size: Images per training batch over all ranks; evaluation takes at least 256.
        callbacks: Callbacks that may keep networks of their own.

    Attributes:
        teacher_metrics: `{"teacher/test": metrics, "teacher/1/val": ...}`, filled by
            `evaluate_teachers`.
        teacher_chance: Under the same keys, what answers reach that do not depend on the image.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        accelerator: Accelerator,
        prepare_batch: Callable[[Any, bool], Batch],
        batch_size: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.method, self.data, self.accelerator = method, data, accelerator
        self.prepare_batch = prepare_batch
        self.batch_size = max(batch_size, MIN_BATCH_SIZE)
        self.callbacks = callbacks
        self.teacher_metrics: dict[str, Metrics] = {}
        self.teacher_chance: dict[str, ChanceLevel] = {}
        # split -> sums of the weights and metrics of the last evaluation
        self._last: dict[str, tuple[Tensor, dict[str, Metrics]]] = {}
        # split -> the first teacher's class ids of each batch, (B,) int64
        self._teacher_classes: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def evaluate_networks(self, split: Split) -> dict[str, Metrics]:
        """Evaluate every network, and the ensemble where there are several; all ranks call it.

        Networks whose weights are those of the last evaluation of this split are not measured
        again.

        Args:
            split: The split to evaluate.

        Returns:
            Network -> `{"top1", "top5", "loss", "ece", "agreement"}`; top5 of more than five
            classes only; agreement being that with the first teacher, if there is one. `"ensemble"`
            is the method's own, else the mean of the networks' probabilities.
        """
        networks = self._synchronise_networks()
        weight_sums = torch.cat([_weight_sums(network) for network in networks])
        last = self._last.get(split.name)
        if last is not None and torch.equal(last[0], weight_sums):
            return {name: dict(row) for name, row in last[1].items()}
        self.method.eval()
        meters = self._make_meters()
        known_classes = self._teacher_classes.get(split.name)
        for number, batch in enumerate(self.batches(split)):
            with self.accelerator.autocast():
                predictions = self._predict(batch["x"])
                classes: Tensor | None = None
                if known_classes is not None:
                    classes = known_classes[number]
                elif self._has_logits(0):
                    classes = self._teacher_logits(0, batch).argmax(1)
            for name, logits in predictions.items():
                meters[name].add(logits.float(), batch["y"], teacher=classes)
        self.method.train()
        rows = {name: meter.compute() for name, meter in meters.items()}
        self._last[split.name] = weight_sums, rows
        return {name: dict(row) for name, row in rows.items()}

    @torch.no_grad()
    def evaluate_teachers(self) -> Iterator[tuple[str, str, Metrics]]:
        """Evaluate each teacher on the test and the validation split; all ranks call it.

        Yields:
            Name, split and metrics. The name is `"teacher"`, or `"teacher/<number>"` from the
            second on.
        """
        for number in range(len(self.method.teachers)):
            if not self._has_logits(number):
                continue
            name = "teacher" if number == 0 else f"teacher/{number}"
            for split in (self.data.test, self.data.val):
                if split is not None:
                    row, chance = self._evaluate_teacher(number, split)
                    self.teacher_chance[f"{name}/{split.name}"] = chance
                    self.teacher_metrics[f"{name}/{split.name}"] = row
                    yield name, split.name, row

    def batches(self, split: Split) -> Iterator[Batch]:
        """This rank's batches of a split, without augmentation.

        Args:
            split: The split to read.
        """
        accelerator = self.accelerator
        loader = prepare_data_loader(
            split.loader(self.batch_size - self.batch_size % accelerator.num_processes),
            accelerator.device,
            accelerator.num_processes,
            accelerator.process_index,
            split_batches=True,
            put_on_device=True,
            even_batches=False,
        )
        for batch in loader:
            yield self.prepare_batch(batch, False)

    def _synchronise_networks(self) -> list[nn.Module]:
        """Give all ranks the same weights; returns the method and the callbacks' networks."""
        self.method.sync()
        networks: list[nn.Module] = [self.method]
        for callback in self.callbacks:
            networks += callback.networks().values()
        for callback in self.callbacks:
            callback.sync()
        for network in networks:
            distributed.broadcast_buffers(network)
        return networks

    def _make_meters(self) -> dict[str, Meter]:
        """A meter for each network and ensemble, also on a rank that gets no batch."""
        from kdtoolkit.metrics.classification import ECE, Agreement, CrossEntropy
        from kdtoolkit.metrics.meter import Meter

        shape = (1, self.data.channels, *self.data.image_size)
        image = torch.zeros(shape, device=self.accelerator.device)
        with self.accelerator.autocast():
            names = list(self._predict(image))
        metrics = [*self._accuracies(), CrossEntropy, ECE, Agreement]
        return {name: Meter([metric() for metric in metrics]) for name in names}

    def _accuracies(self) -> list[type[CountingMetric]]:
        """Top-1, and top-5 where it can be below 100 %."""
        from kdtoolkit.metrics.classification import Top1, Top5

        return [Top1, Top5] if self.data.num_classes > TOP5 else [Top1]

    def _evaluate_teacher(self, number: int, split: Split) -> tuple[Metrics, ChanceLevel]:
        from kdtoolkit.metrics.chance import Chance, ChanceLevel
        from kdtoolkit.metrics.classification import ECE, CrossEntropy
        from kdtoolkit.metrics.meter import Meter

        metrics = [metric() for metric in (*self._accuracies(), CrossEntropy, ECE)]
        meter = Meter([*metrics, Chance(self.data.num_classes)])
        classes = []
        for batch in self.batches(split):
            with self.accelerator.autocast():
                logits = self._teacher_logits(number, batch)
            meter.add(logits.float(), batch["y"])
            classes.append(logits.argmax(1))
        if number == 0 and _is_read_in_order(split):
            self._teacher_classes[split.name] = classes
        row = meter.compute()
        return row, ChanceLevel(int(row.pop("images")), row.pop("chance"))

    def _predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every network and ensemble, all (B, C)."""
        predictions = _add_ensemble(self.method.predict(x), ENSEMBLE)
        for callback in self.callbacks:
            predictions |= _add_ensemble(callback.predict(x), f"{callback.name}/{ENSEMBLE}")
        return predictions

    def _has_logits(self, number: int) -> bool:
        """Whether there is such a teacher and its logits are those of the data's classes."""
        teachers = self.method.teachers
        return number < len(teachers) and teachers[number].has_data_classes

    def _teacher_logits(self, number: int, batch: Batch) -> Tensor:
        logits: Tensor = self.method.teachers[number](batch["x"]).logits
        return logits


def _add_ensemble(predictions: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Add, where there are several networks, the logarithm of their mean probability."""
    if len(predictions) < 2 or name in predictions:
        return predictions
    probabilities = [logits.float().softmax(1) for logits in predictions.values()]
    return predictions | {name: torch.stack(probabilities).mean(0).log()}


def _weight_sums(module: nn.Module) -> Tensor:
    """Sum and sum of squares of each weight and buffer, (N, 2) float64.

    They tell whether weights changed.
    """
    tensors = (v.detach().double() for v in module.state_dict().values() if v.numel())
    return torch.stack([torch.stack([v.sum(), v.square().sum()]) for v in tensors])


def _is_read_in_order(split: Split) -> bool:
    """Whether a second reading gives the same batches; a user's DataLoader may shuffle."""
    return split.user_loader is None or type(split.user_loader.sampler) is SequentialSampler
