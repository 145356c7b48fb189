"""The loop, its first-batch check, evaluation and resume."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from torch import Tensor

from . import checkpoint, distributed, schedules
from .callbacks.base import Callback
from .data import Data, Split
from .journal import Journal
from .method import Method
from .metrics import ECE, Agreement, CrossEntropy, Meter, Top1, Top5
from .types import Batch, Clock, Step


class NonFiniteLoss(RuntimeError):
    """A loss term became nan or infinite."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; it was saved first."""


@dataclass(frozen=True)
class Settings:
    """Numbers of a run. Lengths in epochs or optimizer steps, `batch_size` images per optimizer step over all ranks."""

    epochs: int | None = 10
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: str = "sgd"  # momentum 0.9 without Nesterov, decay on every parameter, as in the papers
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    scheduler: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)  # shares of the run, for "multistep"
    warmup_epochs: float = 0.0
    grad_accum: int = 1
    grad_clip: float | None = None  # largest norm of the gradient
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50  # batches
    eval_every: int = 1  # epochs
    monitor: str | None = "val"  # split that chooses the best epoch; None takes the last
    eval_test: str = "auto"  # "every" epoch or at the "end"; "auto" is "end" where a validation split chooses


class RunState:
    """What accelerate saves beside weights and optimizer, keyed by name: a callback more or less breaks no loading."""

    def __init__(self, run: Run):
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        run = self.run
        states = {c.name: c.state_dict() for c in run.callbacks if c.name}
        return {"step": run.clock.step, "epoch": run.clock.epoch, "best": dict(run.best), "callbacks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        run = self.run
        run.clock.step, run.clock.epoch, run.best = state["step"], state["epoch"], dict(state["best"])
        for callback in run.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.name])


class Run:
    """One training run: what callbacks see, and what is saved.

    accelerator, method (bare), net (prepared), optimizer, scheduler, data, clock, callbacks, settings, output_dir,
    journal (rows of metrics.jsonl), best ({"epoch", "top1"}), stop (set a reason to end after this step).
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        settings: Settings,
        accelerator: Accelerator,
        callbacks: Sequence[Callback] = (),
        output_dir: Path | None = None,
        card: Mapping[str, Any] | None = None,
    ):
        self.method, self.data, self.settings, self.accelerator = method, data, settings, accelerator
        self.callbacks = list(callbacks)
        self.output_dir = output_dir
        self.journal = Journal(output_dir, accelerator.is_main_process)
        self.best: dict[str, float] = {}
        self.stop: str | None = None
        self.signalled = False
        self.teacher_metrics: dict[str, dict[str, float]] = {}
        self._teacher_classes: dict[tuple[int, str], list[Tensor]] = {}
        self._prepare(dict(card or {}))

    # ----------------------------------------------------------------------------------------------------- building
    def _prepare(self, card: dict[str, Any]) -> None:
        s, accelerator = self.settings, self.accelerator
        ranks = accelerator.num_processes
        if s.batch_size % (s.grad_accum * ranks):
            raise ValueError(
                f"batch_size {s.batch_size} is shared by {ranks} processes and {s.grad_accum} accumulation steps and "
                f"does not divide by {s.grad_accum * ranks}; batch_size is images per optimizer step over all of them"
            )
        micro = s.batch_size // s.grad_accum
        rows = self.data.train.len
        if rows is not None and self.data.train.own_loader is None and rows < micro:
            raise ValueError(f"{rows} training images do not fill one batch of {micro}: use a smaller batch_size")
        loader = self.data.train.loader(micro, shuffle=True, drop_last=True)
        self.clock = _clock(s, None if rows is None else len(loader))
        memory = torch.channels_last if s.channels_last else torch.preserve_format
        self.memory_format = memory
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.method.place(accelerator.device, memory, half)
        self.method.to(device=accelerator.device, memory_format=memory)
        if s.compile:
            self.method.compile()
        optimizer = make_optimizer(self.method, s)
        updates = math.ceil(self.clock.total_steps / s.grad_accum)
        warmup = round(s.warmup_epochs * self.clock.steps_per_epoch / s.grad_accum)
        factor = schedules.lr_factor(s.scheduler, updates, warmup=warmup, milestones=s.milestones)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        prepared = accelerator.prepare(self.method, optimizer, loader, scheduler)
        self.net, self.optimizer, self.loader, self.scheduler = prepared
        names = {name: type(net).__name__ for name, net in self.method.networks().items()}
        optim = f"{s.optimizer} lr={s.lr} wd={s.weight_decay} {s.scheduler}"
        self.card = {
            "seed": s.seed,
            "total_steps": self.clock.total_steps,
            "batch_size": s.batch_size,
            "optimizer": optim,
        }
        self.card |= {"networks": names} | card
        accelerator.register_for_checkpointing(RunState(self))

    # ------------------------------------------------------------------------------------------------------- events
    def emit(self, event: str, *args: Any) -> dict[str, Tensor]:
        """Call one event of every callback in order; what `on_losses` returns is put together."""
        extra: dict[str, Tensor] = {}
        for callback in self.callbacks:
            returned = getattr(callback, event)(self, *args)
            if event == "on_losses" and returned:
                twice = [k for k in returned if k in extra or k in args[0].losses]
                if twice:
                    raise ValueError(
                        f"callback {type(callback).__name__} returns the loss {twice[0]!r}, which exists already"
                    )
                extra |= returned
        return extra

    def save(self, name: str = "last") -> Path | None:
        """Write checkpoints/NAME; None without an output folder."""
        if self.output_dir is None:
            return None
        folder = self.output_dir / "checkpoints" / name
        checkpoint.save(self.accelerator, folder, self.card | {"epoch": self.clock.epoch, "step": self.clock.step})
        return folder

    def resume(self, folder: Path) -> None:
        """Go on where the checkpoint `folder` stopped; CheckpointError when it is of another run."""
        checkpoint.check(folder, self.card)
        checkpoint.load(self.accelerator, folder)
        self.journal.rewind(self.clock.step)

    # ------------------------------------------------------------------------------------------------------ the run
    def fit(self) -> None:
        """Train to the end, or until `stop` is set. The teacher is evaluated first."""
        set_seed(self.settings.seed, device_specific=True)
        self.evaluate_teachers()
        try:
            with _interrupts(self):
                self.emit("on_fit_start")
                while self.clock.step < self.clock.total_steps and not self.stop:
                    self._epoch()
        finally:
            self.emit("on_fit_end")
            self.journal.summary()

    def _epoch(self) -> None:
        clock, per_epoch = self.clock, self.clock.steps_per_epoch
        done = clock.step - clock.epoch * per_epoch
        self.data.set_epoch(clock.epoch)
        self.loader.set_epoch(clock.epoch)
        self.emit("on_epoch_start")
        for batch in skip_first_batches(self.loader, done) if done else self.loader:
            self._step(self._finish(batch, train=True))
            if self._interrupted() or self.stop or clock.step >= clock.total_steps:
                break
        if self.stop == "interrupted":
            return
        if clock.step >= (clock.epoch + 1) * per_epoch:
            clock.epoch += 1
        over = clock.step >= clock.total_steps or bool(self.stop)
        self.emit("on_epoch_end", self._evaluate_epoch(over))

    def _interrupted(self) -> bool:
        """Whether a signal came, on any rank: ranks ask each other every tenth step, so that they stop at the same one."""
        if self.signalled and not distributed.active():
            self.stop = "interrupted"
        elif distributed.active() and self.clock.step % 10 == 0:
            if distributed.any_rank(self.signalled, self.accelerator.device):
                self.stop = "interrupted"
        return self.stop == "interrupted"

    def _step(self, batch: Batch) -> None:
        accelerator, net = self.accelerator, self.net
        with accelerator.accumulate(net):
            step: Step = net(batch, self.clock)
            losses = step.losses | self.emit("on_losses", step, batch)
            self._watch(losses)
            accelerator.backward(sum(losses.values()))
            if self.clock.step == 0:
                self._first_batch()
            if accelerator.sync_gradients:
                self.emit("on_grads")
                if self.settings.grad_clip is not None:
                    accelerator.clip_grad_norm_(self.method.parameters(), self.settings.grad_clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.clock.step += 1
        self._images += len(batch["y"]) * accelerator.num_processes
        if self.clock.step % self.settings.log_every == 0 or self.clock.step == self.clock.total_steps:
            self._log()
        self.emit("on_step_end", step)

    def _finish(self, batch: Any, train: bool) -> Batch:
        batch = self.data.finish(
            batch, epoch=self.clock.epoch, train=train, views=self.method.num_views if train else 1
        )
        if self.settings.channels_last and batch["x"].dim() == 4:
            batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
        return batch

    def _first_batch(self) -> None:
        """Every parameter that is trained has a gradient from the first batch, or construction was wrong."""
        without = [n for n, p in self.method.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            raise RuntimeError(
                f"no gradient reached {shown} in the first batch: no loss depends on them. "
                "Freeze them with requires_grad_(False), or add a loss that reads what they make"
            )

    # ------------------------------------------------------------------------------------------------------ numbers
    _window: Tensor | None = None  # (terms,) sums of the weighted losses since the last log row, on the device
    _bad: Tensor | None = None  # (terms,) first step at which a term was not finite, or -1
    _names: list[str] = []
    _count = 0
    _images = 0
    _since = 0.0

    def _watch(self, losses: dict[str, Tensor]) -> None:
        values = torch.stack([v.detach().float() for v in losses.values()])
        if self._window is None or self._names != list(losses):
            self._names, self._count, self._since = list(losses), 0, time.perf_counter()
            self._window, self._bad, self._images = torch.zeros_like(values), torch.full_like(values, -1.0), 0
        assert self._bad is not None
        self._window, self._count = self._window + values, self._count + 1
        first = ~values.isfinite() & (self._bad < 0)
        self._bad = torch.where(first, torch.full_like(values, float(self.clock.step)), self._bad)
        if values.device.type == "cpu":  # costs nothing there; elsewhere once per log row
            self.check_finite()

    def check_finite(self) -> None:
        """NonFiniteLoss with the step and the term, if any loss was nan or infinite since the last call."""
        if self._bad is None:
            return
        steps = self._bad.tolist()
        bad = [(step, name) for step, name in zip(steps, self._names, strict=True) if step >= 0]
        if bad:
            step, name = min(bad)
            kept = self.output_dir / "checkpoints" / "last" if self.output_dir else None
            good = f"the last good checkpoint is {kept} ({checkpoint.where(checkpoint.read_card(kept))})"
            raise NonFiniteLoss(
                f"the loss term {name!r} is not finite at step {int(step)} (epoch {self.clock.epoch}); "
                + (good if kept and kept.exists() else "no checkpoint was written yet")
                + ". Lower lr or the weight of this term, warm up, clip gradients (grad_clip=5.0), or use mixed_precision='no'"
            )

    def _log(self) -> None:
        self.check_finite()
        assert self._window is not None
        means = self.accelerator.reduce(self._window / self._count, reduction="mean").tolist()
        seconds = time.perf_counter() - self._since
        row = {"lr": self.scheduler.get_last_lr()[0], "loss": sum(means)}
        row |= {f"loss/{name}": mean for name, mean in zip(self._names, means, strict=True)}
        row["images_per_s"] = self._images / max(seconds, 1e-9)
        self.journal.add(event="train", epoch=self.clock.epoch, step=self.clock.step, **row)
        self._window = None

    # --------------------------------------------------------------------------------------------------- evaluation
    def _evaluate_epoch(self, over: bool) -> dict[str, float]:
        s = self.settings
        due = over or (self.clock.epoch % s.eval_every == 0)
        every = s.eval_test == "every" or (s.eval_test == "auto" and s.monitor != "val")
        metrics: dict[str, float] = {}
        for split in (self.data.val, self.data.test):
            wanted = split is not None and due and (split is self.data.val or every or over)
            for name in self.method.networks() if wanted else ():
                assert split is not None
                row = self.evaluate(split, name)
                keys = {"epoch": self.clock.epoch, "step": self.clock.step}
                self.journal.add(event="eval", split=split.name, network=name, **keys, **row)
                prefix = f"{split.name}/" if name == "student" else f"{split.name}/{name}/"
                metrics |= {prefix + k: v for k, v in row.items()}
        monitored = metrics.get(f"{s.monitor}/top1") if s.monitor else None
        metrics["improved"] = float(monitored is not None and monitored > self.best.get("top1", -1.0))
        if monitored is not None and metrics["improved"]:
            self.best = {"epoch": self.clock.epoch, "step": self.clock.step, "top1": monitored}
        self._window = None
        return metrics

    @torch.no_grad()
    def evaluate(self, split: Split, network: str) -> dict[str, float]:
        """Numbers of one network over one split: top1, top5, loss, ece, and agreement with the first teacher."""
        distributed.share_buffers(self.method)
        self.method.eval()
        answers = self._teacher_classes.get((0, split.name))
        meter = Meter([Top1(), Top5(), CrossEntropy(), ECE(), Agreement()])
        for number, batch in enumerate(self._batches(split)):
            with self.accelerator.autocast():
                logits = self.method.logits(network, batch["x"])
            meter.add(logits.float(), batch["y"], teacher=answers[number] if answers else None)
        self.method.train()
        return meter.compute()

    @torch.no_grad()
    def evaluate_teachers(self) -> None:
        """Accuracy of each teacher on every split, and its answers, which agreement is measured against."""
        for number, teacher in enumerate(self.method.teachers):
            for split in (self.data.test, self.data.val):
                if split is None or not getattr(teacher, "scored", True):
                    continue
                meter, answers = Meter([Top1(), Top5(), CrossEntropy(), ECE()]), []
                for batch in self._batches(split):
                    with self.accelerator.autocast():
                        logits = teacher(batch["x"]).logits
                    meter.add(logits.float(), batch["y"])
                    answers.append(logits.argmax(1))
                self._teacher_classes[number, split.name] = answers
                row = meter.compute()
                name = "teacher" if number == 0 else f"teacher/{number}"
                self.teacher_metrics[f"{name}/{split.name}"] = row
                self.journal.add(event="teacher", network=name, split=split.name, epoch=0, step=0, **row)

    def _batches(self, split: Split) -> Iterator[Batch]:
        accelerator = self.accelerator
        size = max(self.settings.batch_size, 256)
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
            yield self._finish(batch, train=False)


def make_optimizer(method: Method, s: Settings) -> torch.optim.Optimizer:
    """timm's optimizers by name. "sgd" is plain momentum and "nesterov" Nesterov's, both with decay on every parameter as in
    the papers; every other name is timm's, without decay on biases and norms."""
    plain = {"sgd": "momentum", "momentum": "momentum", "nesterov": "nesterov"}
    try:
        return create_optimizer_v2(
            method,
            opt=plain.get(s.optimizer, s.optimizer),
            lr=s.lr,
            weight_decay=s.weight_decay,
            momentum=s.momentum,
            filter_bias_and_bn=s.optimizer not in plain,
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"unknown optimizer {s.optimizer!r}: 'sgd', 'nesterov', or a name of timm.optim.list_optimizers()"
        ) from error
    except ValueError as error:
        raise ValueError(f"optimizer {s.optimizer!r}: {error}; see timm.optim.list_optimizers()") from error


def _clock(s: Settings, per_epoch: int | None) -> Clock:
    if s.max_steps is not None:
        total = s.max_steps * s.grad_accum
        return Clock(steps_per_epoch=per_epoch or total, total_steps=total)
    if per_epoch is None:
        raise ValueError("streamed data has no length: say how long to train with max_steps=...")
    if s.epochs is None or s.epochs < 1:
        raise ValueError(f"epochs is {s.epochs}: give epochs >= 1, or max_steps")
    return Clock(steps_per_epoch=per_epoch, total_steps=per_epoch * s.epochs)


@contextlib.contextmanager
def _interrupts(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step at hand, save it and say how to go on; a second Ctrl-C ends at once."""

    def handler(number: int, frame: Any) -> None:
        if run.signalled:
            raise KeyboardInterrupt
        run.signalled = True

    old = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
        if run.stop == "interrupted":
            folder = run.save("last")
            how = (
                f"saved to {folder}; go on with resume='auto'"
                if folder
                else "nothing was saved: no output_dir was given"
            )
            raise Interrupted(f"stopped at step {run.clock.step} of {run.clock.total_steps}; {how}")
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
