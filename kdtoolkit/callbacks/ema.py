"""EMA teachers: a moving average of all networks of a run teaches them. Mean teacher (Tarvainen, Valpola 2017, arXiv
1703.01780), peer mean teachers (PCL: Wu, Gong 2021, arXiv 2006.04147), decoupled teachers (DKEL: Shao, Chen 2023).

Loss     "others": sum_i mean_{j != i} KD(z_i, m_j); "own": sum_i D(z_i, m_i); "all": sum_i mean_j D(z_i, m_j); m_j the
         logits of the average of network j, detached; D is KD, or mse or KL of probabilities
Rule     after every optimizer step: teacher <- alpha teacher + (1 - alpha) student, parameters only
Differs  a teacher that nobody asks in a step (weight 0) is not run: it takes the student's BatchNorm statistics
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.method import Method
from kdtoolkit.functional.peers import mean_over_others, stack_logits
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.schedules import check_loss_weight, describe_weight, weight_at
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils import distributed
from kdtoolkit.utils.validation import check_choice, check_temperature

COUNTS = {"constant": None, "from 0": 0, "from 1": 1}
LEARN_FROM = ("others", "own", "all")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.consistency, "kl": partial(functional.consistency, kind="kl"),
}  # fmt: skip
APART = (
    0x5EED  # what the seed of a teacher's dropout and first weights differs in from the students'
)


class EMATeacher(Callback):
    """Keeps an exponential moving average of the whole method, evaluates it, and adds the loss `term`.

    weight       number or schedule; 0 is off, exactly: the average is kept and teaches nobody
    decay        share of the teacher in every update, 0 to 1; None is 0.999, and 1 - 20 / N in runs of N < 20,000
                 updates, whose teacher would else lag behind to the end
    count        "constant": `decay` from the first update; "from 1": min(1 - 1 / (n + 1), decay) with n = 1, 2, ..., as
                 Mean Teacher; "from 0": n = 0, 1, ..., as the released DKEL: its first alpha is 0, the teacher becomes
                 the student and whatever `init` did is lost
    loss         "kd" (at `temperature`), "mse" or "kl" of probabilities
    learn_from   "others" (two networks or more), "own", "all"
    view         number of the view (from 0) that the teacher sees; None: its networks see their students' own views
    mode         "train": the teacher has BatchNorm statistics of its own and dropout; "eval": the student's statistics
    init         "copy" of the students, or "independent": first weights of its own
    init_steps   steps of plain SGD on the mean cross-entropy before the run starts, on its first batches; the released
                 DKEL makes k + 1 of them for `--init k`
    init_lr      learning rate of these; default a hundredth of the run's
    product      True hands over the average in place of the student; a string says which method does so
    term         name of the loss

    Its networks are "ema", "ema/peer1", ...
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
        product: bool | str = True,
        term: str = "ema",
    ):
        check_choice("count", count, COUNTS)
        check_choice("loss", loss, ("kd", *LOSSES))
        check_choice("learn_from", learn_from, LEARN_FROM)
        check_choice("mode", mode, ("train", "eval"))
        check_choice("init", init, ("copy", "independent"))
        check_loss_weight(weight)
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: the teacher's share in an update, from 0 to 1")
        check_temperature(temperature)
        if isinstance(init_steps, bool) or not isinstance(init_steps, int) or init_steps < 0:
            raise ValueError(f"init_steps is {init_steps!r}: a whole number of steps from 0")
        self.weight, self.decay, self.first, self.learn_from = (
            weight,
            decay,
            COUNTS[count],
            learn_from,
        )
        self.loss = LOSSES.get(loss) or partial(functional.kd, temperature=temperature)
        self.view, self.mode, self.product, self.term = view, mode, product, term
        self.init, self.init_steps, self.init_lr = init, init_steps, init_lr
        self.copy: Method | None = None
        self.updates = 0
        self._state: dict[str, Any] | None = None  # of a run that goes on, until the copy is there
        self._cached: tuple[int, dict[str, Tensor]] | None = None  # step, logits
        self._asked = False  # since the last update

    # ----------------------------------------------------------------------------------------------------- the copy
    def check(self, run: Any) -> None:
        method = run.method
        count = len(method.networks())
        if self.learn_from == "others" and count < 2 and self.weight != 0:
            raise ValueError(
                f"EMATeacher(learn_from='others') needs two networks or more, this run trains {count}: use "
                "learn_from='own', or Peers([...])"
            )
        rows = None if run.data is None else run.data.train.len
        batches = None if rows is None else rows // run.config.batch_size
        if batches is not None and self.init_steps > batches:
            raise ValueError(
                f"init_steps={self.init_steps}, an epoch has {batches} batches: use less"
            )
        if self.view is not None and (
            method.num_views < 2 or not 0 <= self.view < method.num_views
        ):
            raise ValueError(
                f"view is {self.view}: views are counted from 0, the method makes {method.num_views} of an image "
                "(method.num_views)"
            )

    def on_fit_start(self, run: Any) -> None:
        method = run.method
        self._cached, self._asked, self.updates = None, False, 0
        updates = run.clock.total_steps / run.config.grad_accum
        self.share = min(0.999, max(1 - 20 / updates, 0.5)) if self.decay is None else self.decay
        state, self._state, self.copy = self._state, None, self._copy(method, run.config.compile)
        if run.clock.step == 0:
            self._initialise(run)
        elif state is not None:
            self.load_state_dict(state)
        self.copy.requires_grad_(False)
        trained, own = method.trainable_parameters(), dict(self.copy.named_parameters())
        self._students: list[Tensor] = list(trained.values())
        self._teachers: list[Tensor] = [own[name] for name in trained]

    def _copy(self, method: Method, compiled: bool) -> Method:
        """Without callbacks; frozen teachers are shared, and mixed precision's forward stays with the method."""
        made = copy.deepcopy(
            method, {id(method.callbacks): (), id(method.teachers): method.teachers}
        )
        made.__dict__.pop("forward", None)
        made.__dict__.pop("_original_forward", None)
        if compiled:
            made.compile()
        return made

    def _initialise(self, run: Any) -> None:
        assert self.copy is not None
        if self.init == "independent":
            for k, net in enumerate(self.copy.networks().values()):
                net.load_state_dict(
                    reinitialised_copy(net, (run.config.seed ^ APART) + k).state_dict()
                )
        if not self.init_steps:
            return
        trained = [p for p in self.copy.trainable_parameters().values() if p.requires_grad]
        lr = run.config.lr / 100 if self.init_lr is None else self.init_lr
        optimizer = torch.optim.SGD(trained, lr=lr, weight_decay=run.config.weight_decay)
        self.copy.train()
        with run.first_batches(self.init_steps) as batches:
            for number, batch in enumerate(batches):
                run.seed_step(0, number)
                each = self.copy.train_logits(run.prepare_batch(batch, train=True)).values()
                known = batch["y"] >= 0  # those without a label are -1
                torch.stack(
                    [functional.ce(z[known], batch["y"][known]) for z in each]
                ).mean().backward()
                for p in trained if not self.copy.networks_per_process else ():
                    if p.grad is not None:
                        distributed.all_reduce_sum(p.grad).div_(distributed.world_size())
                optimizer.step()
                optimizer.zero_grad()

    # ------------------------------------------------------------------------------------------------------- a step
    def logits(self, run: Any, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, C) of the teacher's networks under their students' names, computed once a step."""
        assert self.copy is not None
        known = self.known(run)
        if known is not None:
            return known
        for mine, its in zip(self.copy.modules(), run.method.modules(), strict=True):
            mine.training = self.mode == "train" and its.training  # frozen parts are in eval mode
        if self.view is not None:
            views = batch["views"]
            one = views[:, self.view]
            batch = Batch(**{**batch, "x": one, "views": one.unsqueeze(1).expand_as(views)})
        with torch.no_grad(), _own_draws(batch["x"].device), run.accelerator.autocast():
            found = self.copy.train_logits(batch)
        self._cached, self._asked = (run.clock.step, found), True
        return found

    def known(self, run: Any) -> dict[str, Tensor] | None:
        """What `logits` gave in this step, None where nobody asked."""
        return (
            self._cached[1]
            if self._cached is not None and self._cached[0] == run.clock.step
            else None
        )

    def plan_rows(self) -> list[dict[str, Any]]:
        if self.weight == 0:
            return []
        whom = {"others": "EMA of the others", "own": "its own EMA", "all": "EMA of all networks"}[
            self.learn_from
        ]
        return [
            {
                "loss": self.term,
                "weight": describe_weight(self.weight),
                "student": "every network",
                "teacher": whom,
            }
        ]

    def plan_notes(self) -> list[str]:
        share = "0.999, less in short runs" if self.decay is None else f"{self.decay:g}"
        handed = ", and handed over" if self.product else ""
        return [f"an average of all networks (EMA, decay {share}) is kept, evaluated{handed}"]

    def on_losses(self, run: Any, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        weight = weight_at(self.weight, run.clock)
        if weight == 0:
            return None
        teachers = self.logits(run, batch)
        students = {name: step.logits[name] for name in teachers}
        if self.learn_from == "others":
            each = mean_over_others(
                self.loss,
                stack_logits(list(students.values())),
                stack_logits(list(teachers.values())),
            )
        else:
            own = self.learn_from == "own"
            each = torch.stack([
                torch.stack([self.loss(z, m) for other, m in teachers.items() if not own or other == name]).mean()
                for name, z in students.items()
            ])  # fmt: skip
        return {self.term: weight * each.sum()}

    def on_step_end(self, run: Any, step: Step) -> None:
        self._cached = None
        if not run.accelerator.sync_gradients:
            return
        assert self.copy is not None
        alpha = self.share
        if self.first is not None:
            alpha = functional.ema_alpha(self.updates + self.first, decay=self.share)
        with torch.no_grad():
            torch._foreach_lerp_(self._teachers, self._students, 1 - alpha)
            if self.mode == "eval" or not self._asked:
                for mine, its in zip(self.copy.buffers(), run.method.buffers(), strict=True):
                    mine.copy_(its)
        self.updates, self._asked = self.updates + 1, False

    # --------------------------------------------------------------------------------------------------- evaluation
    def _named(self, name: str) -> str:
        assert self.copy is not None
        return self.name if name == next(iter(self.copy.networks())) else f"{self.name}/{name}"

    def networks(self) -> dict[str, nn.Module]:
        return (
            {}
            if self.copy is None
            else {self._named(n): net for n, net in self.copy.networks().items()}
        )

    def export_candidates(self) -> tuple[list[str], str] | None:
        if self.copy is None or not self.product:
            return None
        names = [self._named(n) for n in self.copy.export_candidates()[0]]
        if isinstance(self.product, str):
            return names, f"the EMA teacher is what {self.product} uses for inference"
        return names, "EMATeacher hands its average over, product=False would not"

    @torch.no_grad()
    def predict(self, x: Tensor) -> dict[str, Tensor]:
        if self.copy is None:
            return {}
        found = self.copy.eval().predict(x)
        self.copy.train()
        return {self._named(name): z for name, z in found.items()}

    def sync(self) -> None:
        if self.copy is not None:
            self.copy.sync()

    def state_dict(self) -> dict[str, Any]:
        if self.copy is None:
            return self._state or {}
        return {
            "weights": dict(self.copy.state_dict()),
            "updates": self.updates,
            "asked": self._asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that goes on loads this before it starts: the state is kept until the copy is there."""
        self._state = state or None
        if self.copy is not None and state:
            self.copy.load_state_dict(state["weights"])
            self.updates, self._asked, self._cached = state["updates"], state["asked"], None


@contextlib.contextmanager
def _own_draws(device: torch.device) -> Iterator[None]:
    """Dropout from a seed of the step that is not the students'; their random numbers go on as if nothing was drawn."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(torch.initial_seed() ^ APART)
        yield
