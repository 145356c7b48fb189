"""EMA teachers: a moving average of all networks of a run teaches them.

Mean teacher (Tarvainen, Valpola 2017, arXiv 1703.01780), peer mean teachers (PCL: Wu, Gong 2021,
arXiv 2006.04147), decoupled teachers (DKEL: Shao, Chen 2023).

Loss: "others": sum_i mean_{j != i} KD(z_i, m_j); "own": sum_i D(z_i, m_i); "all": sum_i mean_j
D(z_i, m_j). m_j are the logits of the average of network j, detached; D is KD, or the squared
difference or KL divergence of probabilities.

Rule: after every optimizer step teacher <- alpha teacher + (1 - alpha) student, parameters only.

Differs: a teacher that no loss reads in a step (weight 0) does not run in it, and takes
the BatchNorm statistics of the student.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.callbacks.ema_init import SEED_OFFSET, reinitialise, train_first_steps
from kdtoolkit.core.callback import Callback, check_same_images
from kdtoolkit.core.method import Method
from kdtoolkit.core.plan import PlanRow
from kdtoolkit.core.run_context import ExportCandidates, RunContext, RunPreview
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils.validation import (
    check_choice,
    check_flag,
    check_fraction,
    check_positive,
    check_temperature,
    check_whole_number,
    describe_value,
)

FIRST_COUNT = {"constant": None, "from 0": 0, "from 1": 1}  # number of the first update
LEARN_FROM = {
    "others": "EMA of the others",
    "own": "its own EMA",
    "all": "EMA of all networks",
}  # as the plan says it
PROBABILITY_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.consistency,
    "kl": partial(functional.consistency, kind="kl"),
}


class EMATeacher(Callback):
    """Keeps an exponential moving average of the whole method, evaluates it, and lets it teach.

    Its networks are named "ema", "ema/peer1", ...

    Args:
        weight: Number or schedule; 0 switches the loss off: the average is kept and teaches no
            network.
        decay: Share of the teacher in every update, 0 to 1. None is 0.999, and 1 - 20 / N in runs
            of N < 20,000 updates, whose teacher would otherwise lag behind to the end.
        count: "constant": `decay` from the first update. "from 1": min(1 - 1 / (n + 1), decay)
            with n = 1, 2, ..., as Mean Teacher. "from 0": n = 0, 1, ..., as the released DKEL: its
            first alpha is 0, the teacher becomes the student, and what `init` did is lost.
        loss: "kd" (at `temperature`), "mse" or "kl" of probabilities.
        temperature: Of "kd"; above 0, no unit.
        learn_from: Whose averages a network learns from: "others" (two networks or more), "own"
            or "all".
        view: Number of the view (from 0) that the teacher sees; None: its networks see the views
            of their students.
        mode: "train": the teacher has BatchNorm statistics of its own and dropout; "eval": it has
            the statistics of the student.
        init: "copy" of the students, or "independent": first weights of its own.
        init_steps: Steps of plain SGD on the mean cross-entropy before the run starts, on its
            first batches. The released DKEL makes k + 1 of them for `--init k`.
        init_lr: Learning rate of these steps; None is a hundredth of that of the run.
        export: Whether the average is exported in place of the student; a string is the name of
            the method that does so, for the reason that is reported.
        term: Name of the loss.
        product: Old name of `export`; goes with the next release.

    Attributes:
        copy: The averaged copy of the method; None before the run starts.
        updates: Number of updates so far.

    Raises:
        ValueError: For an option that is not allowed.
    """

    name = "ema"
    order = 20

    def __init__(
        self,
        weight: LossWeight = 1.0,
        *,
        decay: float | None = None,
        count: str = "constant",
        loss: str = "kd",
        temperature: float = 3.0,
        learn_from: str = "others",
        view: int | None = None,
        mode: str = "train",
        init: str = "copy",
        init_steps: int = 0,
        init_lr: float | None = None,
        export: bool | str = True,
        term: str = "ema",
        product: bool | str | None = None,
    ) -> None:
        check_choice("count", count, FIRST_COUNT)
        check_choice("loss", loss, ("kd", *PROBABILITY_LOSSES))
        check_choice("learn_from", learn_from, LEARN_FROM)
        check_choice("mode", mode, ("train", "eval"))
        check_choice("init", init, ("copy", "independent"))
        check_loss_weight(weight)
        if decay is not None:
            check_fraction("decay", decay, "the share of the teacher in an update")
        check_temperature(temperature)
        check_whole_number("init_steps", init_steps, minimum=0, meaning="optimizer steps")
        if init_lr is not None:
            check_positive("init_lr", init_lr, "learning rate; None is a hundredth of the run's")
        if view is not None:
            check_whole_number("view", view, minimum=0, meaning="number of a view, or None")
        if not isinstance(term, str) or not term:
            raise ValueError(f"term is {describe_value(term)}; allowed: the name of the loss")
        if product is not None:
            warnings.warn(
                "EMATeacher(product=...) is named export=... now; the old name goes with the next "
                "release",
                DeprecationWarning,
                stacklevel=2,
            )
            export = product
        if not isinstance(export, str) or not export:
            check_flag("export", export)
        self.weight, self.decay, self.first_count = weight, decay, FIRST_COUNT[count]
        kd = partial(functional.kd, temperature=temperature)
        self.loss = PROBABILITY_LOSSES.get(loss, kd)
        self.learn_from, self.view, self.mode = learn_from, view, mode
        self.init, self.init_steps, self.init_lr = init, init_steps, init_lr
        self.export, self.term = export, term
        self.copy: Method | None = None
        self.updates = 0
        self._resumed_state: dict[str, Any] | None = None  # until the copy is made
        self._cached: tuple[int, dict[str, Tensor]] | None = None  # step, logits
        self._ran = False  # whether the teacher ran since the last update

    # ------------------------------------------------------------------------------------ the copy
    def check(self, run: RunPreview) -> None:
        """Refuse one network, or other images, to learn from others; missing views or batches."""
        method = run.method
        count = len(method.networks())
        if self.learn_from == "others" and count < 2 and self.weight != 0:
            raise ValueError(
                "EMATeacher(learn_from='others') needs two networks or more, this run trains "
                f"{count}: use learn_from='own', or Peers([...])"
            )
        if self.learn_from != "own" and self.weight != 0:
            check_same_images(self, method)
        rows = None if run.data is None else run.data.train.num_rows
        batches = None if rows is None else rows // run.config.batch_size
        if batches is not None and self.init_steps > batches:
            raise ValueError(
                f"init_steps={self.init_steps}, an epoch has {batches} batches: use less"
            )
        if self.view is None:
            return
        if method.num_views < 2 or not 0 <= self.view < method.num_views:
            raise ValueError(
                f"view is {self.view}: views are counted from 0, the method makes "
                f"{method.num_views} of an image (method.num_views)"
            )

    def on_fit_start(self, run: RunContext) -> None:
        """Make the copy: of the students, with first weights of its own, or as it was saved."""
        self._cached, self._ran, self.updates = None, False, 0
        num_updates = run.clock.total_steps / run.config.grad_accum
        short_run = min(0.999, max(1 - 20 / num_updates, 0.5))
        self.highest_alpha = short_run if self.decay is None else self.decay
        state, self._resumed_state = self._resumed_state, None
        self.copy = run.method.clone()
        if run.config.compile:
            self.copy.compile()
        if run.clock.step == 0:
            if self.init == "independent":
                reinitialise(self.copy, run.config.seed)
            train_first_steps(self.copy, run, self.init_steps, self.init_lr)
        elif state is not None:
            self.load_state_dict(state)
        self.copy.requires_grad_(False)
        students, teachers = run.method.trainable_parameters(), dict(self.copy.named_parameters())
        self._students: list[Tensor] = list(students.values())
        self._teachers: list[Tensor] = [teachers[name] for name in students]

    def _started_copy(self) -> Method:
        assert self.copy is not None, "EMATeacher has a copy from on_fit_start on"
        return self.copy

    # -------------------------------------------------------------------------------------- a step
    def logits(self, run: RunContext, batch: Batch) -> dict[str, Tensor]:
        """Logits of the teacher's networks, computed once a step.

        Args:
            run: The run.
            batch: The batch of this step.

        Returns:
            Logits (B, C), detached, by the names of the students.
        """
        known = self.cached_logits(run)
        if known is not None:
            return known
        copy = self._started_copy()
        for own, students in zip(copy.modules(), run.method.modules(), strict=True):
            own.training = self.mode == "train" and students.training  # not so in frozen parts
        if self.view is not None:
            views = batch["views"]
            seen = views[:, self.view]
            batch = Batch(**{**batch, "x": seen, "views": seen.unsqueeze(1).expand_as(views)})
        with torch.no_grad(), _own_seed(batch["x"].device), run.accelerator.autocast():
            found = copy.train_logits(batch)
        self._cached, self._ran = (run.clock.step, found), True
        return found

    def cached_logits(self, run: RunContext) -> dict[str, Tensor] | None:
        """What `logits` has returned in this step; None if the teacher did not run in it.

        Args:
            run: The run; its clock says which step it is.

        Returns:
            Logits (B, C), detached, by the names of the students; or None.
        """
        if self._cached is None or self._cached[0] != run.clock.step:
            return None
        return self._cached[1]

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weight of its loss."""
        return {self.term: self.weight}

    def plan_rows(self) -> list[PlanRow]:
        """The loss, unless its weight is 0."""
        if self.weight == 0:
            return []
        teacher, weight = LEARN_FROM[self.learn_from], describe_weight(self.weight)
        return [PlanRow(loss=self.term, weight=weight, student="every network", teacher=teacher)]

    def plan_notes(self) -> list[str]:
        """That an average is kept, with which decay."""
        share = "0.999, less in short runs" if self.decay is None else f"{self.decay:g}"
        exported = " and exported" if self.export else ""
        return [f"an average of all networks (EMA, decay {share}) is kept, evaluated{exported}"]

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The loss between every network and the averages; see the module."""
        weight = weight_at(self.weight, run.clock, self.term)
        if weight == 0:
            return None
        teachers = self.logits(run, batch)
        students = {name: step.logits[name] for name in teachers}
        if self.learn_from == "others":
            each = functional.mean_over_others(
                self.loss,
                functional.stack_logits(list(students.values())),
                functional.stack_logits(list(teachers.values())),
            )
        else:
            each = torch.stack([self._loss_of(name, z, teachers) for name, z in students.items()])
        return {self.term: weight * each.sum()}

    def _loss_of(self, name: str, student: Tensor, teachers: dict[str, Tensor]) -> Tensor:
        """Mean loss of one network, from its own average or from all."""
        chosen = [teachers[name]] if self.learn_from == "own" else list(teachers.values())
        return torch.stack([self.loss(student, teacher) for teacher in chosen]).mean()

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """Update the average, if the optimizer has stepped."""
        self._cached = None
        if not run.accelerator.sync_gradients:
            return
        alpha = self.highest_alpha
        if self.first_count is not None:
            alpha = functional.ema_alpha(self.updates + self.first_count, decay=alpha)
        functional.ema_update_(self._students, self._teachers, alpha=alpha)
        if self.mode == "eval" or not self._ran:
            self._copy_buffers(run.method)
        self.updates, self._ran = self.updates + 1, False

    @torch.no_grad()
    def _copy_buffers(self, method: Method) -> None:
        for own, students in zip(self._started_copy().buffers(), method.buffers(), strict=True):
            own.copy_(students)

    # ---------------------------------------------------------------------------------- evaluation
    def _name_of(self, name: str) -> str:
        """Name under which the average of a network is known in the run."""
        is_first = name == next(iter(self._started_copy().networks()))
        return self.name if is_first else f"{self.name}/{name}"

    def networks(self) -> dict[str, nn.Module]:
        """The averaged networks: "ema", "ema/peer1", ..."""
        if self.copy is None:
            return {}
        return {self._name_of(name): net for name, net in self.copy.networks().items()}

    def export_candidates(self) -> ExportCandidates | None:
        """The averages of the method's candidates, unless `export` is False."""
        if self.copy is None or not self.export:
            return None
        names = [self._name_of(name) for name in self.copy.export_candidates()[0]]
        if isinstance(self.export, str):
            return names, f"the EMA teacher is what {self.export} uses for inference"
        return names, "EMATeacher exports its average; export=False exports the student"

    @torch.no_grad()
    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of the averages for images (B, 3, H, W) in [0, 1], in eval mode."""
        if self.copy is None:
            return {}
        found = self.copy.eval().predict(x)
        self.copy.train()
        return {self._name_of(name): z for name, z in found.items()}

    def sync(self) -> None:
        """Exchange the averages, where each process trains networks of its own."""
        if self.copy is not None:
            self.copy.sync()

    def state_dict(self) -> dict[str, Any]:
        """The weights of the average and the number of updates."""
        if self.copy is None:
            return self._resumed_state or {}
        weights = dict(self.copy.state_dict())
        return {"weights": weights, "updates": self.updates, "asked": self._ran}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the average; before the run starts, keep it until the copy is made."""
        self._resumed_state = state or None
        if self.copy is not None and state:
            self.copy.load_state_dict(state["weights"])
            self.updates, self._ran, self._cached = state["updates"], state["asked"], None


@contextlib.contextmanager
def _own_seed(device: torch.device) -> Iterator[None]:
    """Dropout from a seed of the step that is not that of the students, whose state is restored."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(torch.initial_seed() ^ SEED_OFFSET)
        yield
