"""The loop, its first-batch check and resume."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from torch import Tensor

from kdtoolkit.core.callback import Callback, ordered_callbacks
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.method import Method
from kdtoolkit.data.augment import key
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.trainer.evaluator import Evaluator
from kdtoolkit.trainer.loop_state import LoopState
from kdtoolkit.trainer.loss_tracker import LossTracker, NonFiniteLoss
from kdtoolkit.trainer.metrics_log import MetricsLog
from kdtoolkit.trainer.optim import make_loader_and_schedule, make_optimizer
from kdtoolkit.types import Batch, Step
from kdtoolkit.utils import checkpoint, distributed
from kdtoolkit.utils.memory import keep_freed_memory
from kdtoolkit.utils.signals import Interrupted, catch_stop_signals
from kdtoolkit.utils.state import preserve_random_state

ASK_RANKS = 10  # optimizer steps between two exchanges of "was any rank told to stop?"


class Trainer:
    """One training run: what callbacks see, and what is saved.

    accelerator, method (bare), net (prepared), optimizer, scheduler, data, clock, callbacks, config, output_dir,
    journal (rows of metrics.jsonl), best ({"epoch", "step", "top1", "network"}), stop (set a reason to end after this
    step). Callbacks are those of the method and the given ones, by their `order`.
    `layers` {parameter of the first network: layer} is needed for config.layer_decay.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: TrainerConfig,
        accelerator: Accelerator,
        callbacks: Sequence[Callback] = (),
        output_dir: Path | None = None,
        card: Mapping[str, Any] | None = None,
        layers: Mapping[str, int] | None = None,
    ):
        self.method, self.data, self.config, self.accelerator = (
            method,
            data,
            config,
            accelerator,
        )
        self.callbacks = ordered_callbacks(method, callbacks)
        for callback in self.callbacks:
            callback.check(self)
        self.output_dir = output_dir
        self.metrics_log = MetricsLog(output_dir, accelerator.is_main_process)
        self.loss_tracker = LossTracker()
        self.evaluator = Evaluator(
            method, data, accelerator, self.prepare_batch, config.batch_size, self.callbacks
        )
        self.best: dict[str, Any] = {}
        self.stop: str | None = None
        self.signalled = False
        self.epoch_start = 0  # step at which this epoch began
        self._prepare(dict(card or {}), layers)

    @property
    def teacher_metrics(self) -> dict[str, dict[str, float]]:
        return self.evaluator.teacher_metrics

    # ----------------------------------------------------------------------------------------------------- building
    def _prepare(self, card: dict[str, Any], layers: Mapping[str, int] | None) -> None:
        s, accelerator = self.config, self.accelerator
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        memory = torch.channels_last if s.channels_last else torch.preserve_format
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.method.place_teachers(accelerator.device, memory, half)
        alone = self.method.networks_per_process
        ranks = 1 if alone else accelerator.num_processes
        loader, self.clock, factor = make_loader_and_schedule(
            s, self.data, ranks, self.method.batch_sampler
        )
        self.method.to(device=accelerator.device)
        self.method.to(memory_format=memory)
        if s.compile:
            self.method.compile()
        optimizer = make_optimizer(self.method, s, layers)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if (
            alone
        ):  # every process has networks of its own: no averaged gradients, no shares of a batch
            self.net = accelerator.prepare_model(self.method, evaluation_mode=True)
            self.loader = self._whole_batches(loader)
            self.optimizer, self.scheduler = accelerator.prepare(optimizer, scheduler)
        else:
            prepared = accelerator.prepare(self.method, optimizer, loader, scheduler)
            self.net, self.optimizer, self.loader, self.scheduler = prepared
        names = {name: type(net).__name__ for name, net in self.method.networks().items()}
        optim = f"{s.optimizer} lr={s.lr} wd={s.weight_decay} {s.scheduler}"
        if s.layer_decay is not None:
            optim += f" layer_decay={s.layer_decay}"
        if s.grad_accum > 1:
            optim += f" grad_accum={s.grad_accum}"
        told = {
            "seed": s.seed,
            "total_steps": self.clock.total_steps,
            "batch_size": s.batch_size,
            "optimizer": optim,
        }
        self.checkpoint_metadata = told | {"networks": names} | card
        self._state = LoopState(self)
        accelerator.register_for_checkpointing(self._state)

    def _whole_batches(self, loader: Any) -> Any:
        same = {"put_on_device": True, "use_seedable_sampler": True, "non_blocking": True}
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            1,
            0,
            split_batches=True,
            data_seed=self.config.seed,
            **same,
        )

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
        """Write checkpoints/NAME, if everything is finite; None without an output folder. All ranks call it."""
        self.check_finite(weights=True)
        if self.output_dir is None:
            return None
        folder = self.output_dir / "checkpoints" / name
        self.sync(self.optimizer)
        self.loss_tracker.interval.share()
        self.loss_tracker.epoch.share()
        checkpoint.save(
            self.accelerator,
            folder,
            self.checkpoint_metadata | {"epoch": self.clock.epoch, "step": self.clock.step},
        )
        return folder

    def sync(self, optimizer: Any = None) -> None:
        """Every network everywhere, where processes train networks of their own. All ranks call it."""
        self.method.sync(optimizer)
        for callback in self.callbacks:
            callback.sync()

    # ------------------------------------------------------------------------------------------------------ the run
    def fit(self, resume_from: Path | None = None) -> None:
        """Train to the end, or until `stop` is set. The teacher is evaluated first.

        resume_from  checkpoint to go on from; CheckpointError when it is of another run
        """
        if resume_from is not None:
            found = checkpoint.check_metadata(resume_from, self.checkpoint_metadata)
            self.metrics_log.rewind(found["step"])
            self.accelerator.wait_for_everyone()
        set_seed(self.config.seed, device_specific=True)
        self._evaluate_teachers()
        if resume_from is not None:
            checkpoint.load(self.accelerator, resume_from)
            checkpoint.restore_best(self.accelerator, resume_from, self.output_dir, self.best)
        try:
            with catch_stop_signals(self._flag):
                self.emit("on_fit_start")
                while self.clock.step < self.clock.total_steps and not self.stop:
                    self._epoch()
                if self.stop == "interrupted":
                    self._interrupted()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.emit("on_fit_end")
                self.metrics_log.summary()
            raise
        self.emit("on_fit_end")
        self.metrics_log.summary()

    def close(self) -> None:
        """Give the accelerator back without this run's state."""
        with contextlib.suppress(ValueError, AttributeError):
            self.accelerator._custom_objects.remove(self._state)
        self.accelerator.free_memory()

    def _epoch(self) -> None:
        clock = self.clock
        end = min(clock.total_steps, self.epoch_start + clock.steps_per_epoch)
        self.method.train()
        self.data.set_epoch(clock.epoch)
        self.loader.set_epoch(clock.epoch)
        self.emit("on_epoch_start")
        self.seed_step(clock.epoch, -1)
        for batch in self._rest_of_epoch() if clock.step < end else ():
            if clock.step >= end:
                break
            self._step(self.prepare_batch(batch, train=True))
            if self.stop or (clock.step < end and self._stop_requested()):
                break
        if self.stop == "interrupted":
            return
        if clock.step == self.epoch_start:
            raise ValueError(
                "the training data gave no batch: too few images for batch_size, or an empty stream"
            )
        self._end_epoch()
        if not self.stop and clock.step < clock.total_steps:
            self._stop_requested(now=True)

    def _rest_of_epoch(self) -> Iterator[Any]:
        done = self.clock.step - self.epoch_start
        try:
            yield from skip_first_batches(self.loader, done) if done else self.loader
        except (
            ValueError
        ) as error:  # accelerate's word for a stream that ends before its first batch
            if "does not contain any data" not in str(error):
                raise

    def _end_epoch(self) -> None:
        clock = self.clock
        if self.loss_tracker.interval.count:
            self._log()
        self.check_finite()
        clock.epoch += 1
        self.epoch_start = clock.step
        row = self.loss_tracker.close("epoch")
        self.metrics_log.add(
            event="epoch",
            epoch=clock.epoch,
            step=clock.step,
            lr=max(self.scheduler.get_last_lr()),
            **row,
        )
        over = clock.step >= clock.total_steps or bool(self.stop)
        self.emit("on_epoch_end", self._evaluate_epoch(over))

    def _step(self, batch: Batch) -> None:
        accelerator, net, clock = self.accelerator, self.net, self.clock
        self.seed_step(clock.epoch, clock.step)
        with accelerator.accumulate(net):
            step: Step = net(batch, clock)
            losses = step.losses | self.emit("on_losses", step, batch)
            ranks = 1 if self.method.networks_per_process else accelerator.num_processes
            self.loss_tracker.add(losses, clock.step, len(batch["y"]) * ranks)
            if accelerator.device.type == "cpu":  # costs nothing there; elsewhere once per log row
                self.check_finite()
            accelerator.backward(sum(losses.values()))
            if clock.step == 0:
                self._first_batch(losses)
            if accelerator.sync_gradients:
                self.emit("on_grads")
                if self.config.grad_clip is not None:
                    accelerator.unscale_gradients()
                    for parameters in self.method.clip_groups():
                        torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        clock.step += 1
        if clock.step % self.config.log_every == 0:
            self._log()
        self.emit("on_step_end", step)

    def seed_step(self, epoch: int, step: int) -> None:
        """Dropout and other draws of a step depend on (seed, rank, step) alone: a resumed run makes the same ones."""
        rank = 0 if self.method.networks_per_process else self.accelerator.process_index
        torch.manual_seed(key(self.config.seed, rank, epoch, step))

    def prepare_batch(self, batch: Any, train: bool) -> Batch:
        batch = self.data.finish(
            batch, epoch=self.clock.epoch, train=train, views=self.method.num_views if train else 1
        )
        if self.config.channels_last and batch["x"].dim() == 4:
            batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
        return batch

    @contextlib.contextmanager
    def first_batches(self, count: int) -> Iterator[Iterator[Any]]:
        """The first `count` raw batches of the run, which will read them again as if they had not been read."""
        with preserve_random_state():
            self.data.set_epoch(0)
            self.loader.set_epoch(0)
            self.seed_step(0, -1)
            try:
                yield itertools.islice(self.loader, count)
            finally:
                with contextlib.suppress(ValueError):  # it was read to its end
                    self.loader.end()

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        """This rank's batches of a split, for evaluation."""
        return self.evaluator.batches(split)

    def _first_batch(self, losses: dict[str, Tensor]) -> None:
        """Every loss reaches a parameter, and every parameter that is trained has a gradient from the first batch, or
        construction was wrong."""
        constant = [name for name, loss in losses.items() if not loss.requires_grad]
        dead = (
            constant[0]
            if constant and (not self.method.networks_per_process or len(constant) == len(losses))
            else None
        )
        if dead is not None:
            raise RuntimeError(
                f"the loss {dead!r} reaches no trained parameter: what it reads is frozen. Freeze less, or leave it out"
            )
        without = [
            n for n, p in self.method.trainable_parameters().items() if p.requires_grad and p.grad is None
        ]
        if without:
            shown = ", ".join(without[:5]) + (
                f" and {len(without) - 5} more" if len(without) > 5 else ""
            )
            raise RuntimeError(
                f"no gradient reached {shown} in the first batch: no loss depends on them. "
                "Freeze them with requires_grad_(False), or add a loss that reads what they make"
            )

    # ---------------------------------------------------------------------------------------------------- interrupts
    def _flag(self) -> bool:
        before, self.signalled = self.signalled, True
        return before

    def _stop_requested(self, now: bool = False) -> bool:
        """Whether a signal came, on any rank. Only between optimizer steps; ranks ask each other every tenth of them,
        so that they stop at the same one."""
        if not self.accelerator.sync_gradients:
            return False
        if distributed.is_distributed():
            if not now and (self.clock.step // self.config.grad_accum) % ASK_RANKS:
                return False
            self.signalled = distributed.any_rank(self.signalled, self.accelerator.device)
        if self.signalled:
            self.stop = "interrupted"
        return self.signalled

    def _interrupted(self) -> None:
        folder = self.save("last")
        how = (
            f"saved to {folder}; go on with resume='auto'"
            if folder
            else "nothing was saved: no output_dir was given"
        )
        raise Interrupted(f"stopped at step {self.clock.step} of {self.clock.total_steps}; {how}")

    # ------------------------------------------------------------------------------------------------------ numbers
    def check_finite(self, weights: bool = False) -> None:
        """NonFiniteLoss with the step and the term, if a loss was nan or infinite; with `weights`, if a weight is."""
        broken = self.loss_tracker.broken()
        if broken:
            step, name = broken
            what, advice = (
                f"the loss term {name!r} is not finite at step {step}",
                "the weight of this term",
            )
        elif weights:
            weight = _not_finite(self.method)
            if weight is None:
                return
            what, advice = (
                f"the weight {weight} is not finite after step {self.clock.step}",
                "the weights of the losses",
            )
        else:
            return
        kept = self.output_dir / "checkpoints" / "last" if self.output_dir else None
        good = "no checkpoint was written yet"
        if kept is not None and kept.exists():
            good = f"the last good checkpoint is {kept} ({checkpoint.describe_position(checkpoint.read_metadata(kept))})"
        raise NonFiniteLoss(
            f"{what} (epoch {self.clock.epoch}); {good}. Lower lr or {advice}, warm up, "
            "clip gradients (grad_clip=5.0), or use mixed_precision='no'"
        )

    def _log(self) -> None:
        self.check_finite()
        row = {"lr": max(self.scheduler.get_last_lr())} | self.loss_tracker.close("interval")
        self.metrics_log.add(event="train", epoch=self.clock.epoch, step=self.clock.step, **row)

    # --------------------------------------------------------------------------------------------------- evaluation
    def _evaluate_epoch(self, over: bool) -> dict[str, float]:
        s = self.config
        due = over or (self.clock.epoch % s.eval_every == 0)
        every = s.eval_test == "every" or (s.eval_test == "auto" and s.monitor != "val")
        metrics: dict[str, float] = {}
        for split in (self.data.val, self.data.test):
            if split is None or not due or not (split is self.data.val or every or over):
                continue
            for name, row in self.evaluator.networks(split).items():
                keys = {"epoch": self.clock.epoch, "step": self.clock.step}
                self.metrics_log.add(event="eval", split=split.name, network=name, **keys, **row)
                metrics |= {_named(split.name, name, key): v for key, v in row.items()}
        tops = (
            {n: metrics.get(_named(s.monitor, n, "top1")) for n in self.export_candidates()[0]}
            if s.monitor
            else {}
        )
        found = {name: top1 for name, top1 in tops.items() if top1 is not None}
        metrics["improved"] = float(
            bool(found) and max(found.values()) > self.best.get("top1", -1.0)
        )
        if found:
            metrics["monitored"] = max(found.values())
        if metrics["improved"]:
            name = max(found, key=found.__getitem__)
            at = {"epoch": self.clock.epoch, "step": self.clock.step}
            self.best = at | {"top1": found[name], "network": name}
        return metrics

    def export_candidates(self) -> tuple[list[str], str]:
        """Names of networks one of which is handed over, and why these: a callback's before the method's."""
        named = (callback.export_candidates() for callback in self.callbacks)
        return next((found for found in named if found), None) or self.method.export_candidates()

    def _evaluate_teachers(self) -> None:
        """Accuracy of each teacher on every split; a resumed run has the rows already."""
        for name, split, row in self.evaluator.teachers():
            told = {"event": "teacher", "network": name, "split": split}
            if not any(told.items() <= r.items() for r in self.metrics_log.rows):
                self.metrics_log.add(**told, epoch=0, step=0, **row)


def _named(split: str, network: str, number: str) -> str:
    return f"{split}/{number}" if network == "student" else f"{split}/{network}/{number}"


def _not_finite(method: Method) -> str | None:
    """Name of the first parameter with a value that is not finite; the device is asked once."""
    named = list(method.named_parameters())
    if not named or bool(torch.stack([p.detach().isfinite().all() for _, p in named]).all()):
        return None
    return next(n for n, p in named if not bool(p.detach().isfinite().all()))
