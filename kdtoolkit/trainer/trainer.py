"""The training loop."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from kdtoolkit.core.callback import Callback, check_states, ordered_callbacks
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.method import Method
from kdtoolkit.core.run_context import ExportCandidates, RunPreview, last_step_of_epoch
from kdtoolkit.data.dataset import Data, Split
from kdtoolkit.data.sampler_state import SamplerState
from kdtoolkit.data.seeding import derive_seed
from kdtoolkit.trainer import checks, loss_checks
from kdtoolkit.trainer.batches import remaining_batches
from kdtoolkit.trainer.best_epoch import replace_lost_best, update_best
from kdtoolkit.trainer.epoch_evaluation import (
    evaluate_epoch,
    evaluate_teachers,
)
from kdtoolkit.trainer.evaluator import Evaluator
from kdtoolkit.trainer.loop_state import LoopState
from kdtoolkit.trainer.loss_checks import owner
from kdtoolkit.trainer.loss_tracker import LossTracker
from kdtoolkit.trainer.metrics_log import MetricsLog
from kdtoolkit.trainer.preparation import describe_for_checkpoint, prepare_training
from kdtoolkit.trainer.stop_signal import INTERRUPTED, StopSignal
from kdtoolkit.types import Batch, Step
from kdtoolkit.utils import checkpoint, checkpoint_store
from kdtoolkit.utils.rank_monitor import report_failure
from kdtoolkit.utils.signals import (
    Interrupted,
    by_signal,
    explain_interruption,
    handle_stop_signals,
)
from kdtoolkit.utils.state import preserve_random_state

if TYPE_CHECKING:
    from kdtoolkit.metrics.chance import ChanceLevel

Event = Literal[
    "on_fit_start", "on_epoch_start", "on_grads", "on_step_end", "on_epoch_end", "on_fit_end"
]


class Trainer:
    """One training run: the loop, what callbacks see of it (a `RunContext`), and what is saved.

    Args:
        method: Owns every trained parameter. Its networks, and teachers, are moved to the device.
        data: Training, validation and test splits.
        config: Numbers of the loop.
        accelerator: Device, precision and ranks.
        callbacks: Called beside the method's own, by their `order`.
        output_dir: Folder of the run; None writes nothing.
        metadata: Further settings that a checkpoint must share with the run that resumes it.
        layers: Parameter of the first network -> layer, for `config.layer_decay`.

    Attributes:
        net: The method as `accelerate` prepared it.
        loader: Prepared training batches.
        optimizer: Prepared optimizer.
        scheduler: Prepared learning-rate schedule.
        clock: Step and epoch, and how many there are.
        metrics_log: The rows of `metrics.jsonl`.
        loss_tracker: Mean losses since the last row and of the epoch.
        loss_owners: Which callback returned a loss, by the loss's name.
        evaluator: Evaluates networks and teachers.
        best: `{"epoch", "step", "top1", "network"}` of the best evaluation; empty before the first.
        stop: A reason to end the run after this step, which a callback may set.
        stop_signal: Records Ctrl-C, SIGTERM and SIGHUP and shares them between ranks.
        epoch_start: Step at which this epoch began.
        sampler_state: What draws the rows of a user's DataLoader.
        checkpoint_metadata: Settings that a checkpoint must share with the run that resumes it.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: TrainerConfig,
        accelerator: Accelerator,
        callbacks: Sequence[Callback] = (),
        output_dir: Path | None = None,
        metadata: Mapping[str, Any] | None = None,
        layers: Mapping[str, int] | None = None,
    ) -> None:
        self.method, self.data, self.config = method, data, config
        self.accelerator, self.output_dir = accelerator, output_dir
        self.callbacks = ordered_callbacks(method, callbacks)
        preview = RunPreview(method, data, config, self.callbacks)
        for callback in self.callbacks:
            callback.check(preview)
        if output_dir is not None:
            check_states(self.callbacks)
        self.metrics_log = MetricsLog(output_dir, accelerator.is_main_process)
        self.loss_tracker = LossTracker()
        self.loss_owners: dict[str, str] = {}  # of losses that callbacks return
        self.evaluator = Evaluator(
            method, data, accelerator, self.prepare_batch, config.batch_size, self.callbacks
        )
        self.best: dict[str, Any] = {}
        self.stop: str | None = None
        self.stop_signal = StopSignal(accelerator, config.grad_accum)
        self.epoch_start = 0
        self.sampler_state = SamplerState(data.train)
        prepared = prepare_training(method, data, config, accelerator, layers)
        self.net, self.optimizer, self.scheduler, self.loader, self.clock = prepared
        self._used_lr = self._highest_lr()  # of the last step
        loss_checks.check_schedules(method, self.callbacks, self.clock)
        self.checkpoint_metadata = describe_for_checkpoint(method, config, self.clock)
        self.checkpoint_metadata |= metadata or {}
        self._state = LoopState(self)

    # ---------------------------------------------------------------------------------------- loop
    def fit(self, resume_from: Path | None = None) -> None:
        """Evaluate the teachers, then train to the end, or until `stop` is set.

        Args:
            resume_from: Folder of a checkpoint to continue from.

        Raises:
            CheckpointError: If the checkpoint is of another run or damaged.
            NonFiniteLoss: If a loss or a weight becomes nan or infinite.
            Interrupted: After Ctrl-C, SIGTERM or SIGHUP; the run was saved.
            RankFailed: If another process of the run failed, ended or answers no more.
        """
        self._start(resume_from)
        with explain_interruption(lambda: f"at once; {self._describe_last()}"):
            try:
                with handle_stop_signals(self.stop_signal.receive):
                    self._run_epochs()
            except BaseException as error:
                report_failure(error)  # what follows may wait for other ranks
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self._finish()
                raise
            self._finish()

    def _run_epochs(self) -> None:
        self.emit("on_fit_start")
        while self.clock.step < self.clock.total_steps and not self.stop:
            self._run_epoch()
        if self.stop == INTERRUPTED:
            self._save_and_interrupt()
        if self.stop_signal.is_received(self.clock.step, exchange_now=True):
            self._interrupt("after the last step", self._describe_last())

    def _run_epoch(self) -> None:
        clock = self.clock
        end = last_step_of_epoch(self)
        self.method.train()
        self.data.set_epoch(clock.epoch)
        self.loader.set_epoch(clock.epoch)
        self.emit("on_epoch_start")
        self.seed_step(clock.epoch, -1)
        self.sampler_state.start_epoch()
        for batch in remaining_batches(self.loader, clock, self.epoch_start, end):
            self._train_step(self.prepare_batch(batch, train=True))
            if clock.step < end and not self.stop:
                self._stop_after_signal()
            if self.stop:
                break
        if self.stop == INTERRUPTED:
            return
        if clock.step == self.epoch_start:
            raise ValueError(
                "the training data gave no batch: too few images for batch_size, or an empty stream"
            )
        self._end_epoch()
        if not self.stop and clock.step < clock.total_steps:
            self._stop_after_signal(exchange_now=True)

    def _train_step(self, batch: Batch) -> None:
        accelerator, clock = self.accelerator, self.clock
        self.seed_step(clock.epoch, clock.step)
        with accelerator.accumulate(self.net):
            step = loss_checks.check_step(self.net(batch, clock), self.method)
            losses = step.losses | self._callback_losses(step, batch)
            self.loss_tracker.add(losses, clock.step, len(batch["y"]) * self._ranks_per_batch)
            # costs nothing on the CPU; elsewhere it waits for the device, so only when losses are
            # logged
            if accelerator.device.type == "cpu":
                self.check_finite()
            accelerator.backward(sum(losses.values()))
            if clock.step == 0:
                checks.check_first_gradients(self.method, losses, self.loss_owners)
            if accelerator.sync_gradients:
                self.emit("on_grads")
                self._clip_gradients()
            self._used_lr = self._highest_lr()  # callbacks may have set it
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        clock.step += 1
        if clock.step % self.config.log_every == 0:
            self._log_losses()
        self.emit("on_step_end", step)

    def _end_epoch(self) -> None:
        clock = self.clock
        if self.loss_tracker.interval.count:
            self._log_losses()
        self.check_finite()
        clock.epoch += 1
        self.epoch_start = clock.step
        row = self.loss_tracker.close_epoch()
        self.metrics_log.add(event="epoch", **self._position(), lr=self._used_lr, **row)
        is_last = clock.step >= clock.total_steps or bool(self.stop)
        self.emit("on_epoch_end", self._evaluate(is_last))

    # ------------------------------------------------------------------------------ start and end
    def _start(self, resume_from: Path | None) -> None:
        """Seed, evaluate the teachers, load the checkpoint."""
        if resume_from is not None:
            found = checkpoint.check_metadata(resume_from, self.checkpoint_metadata)
            self.metrics_log.rewind(found["step"])
            self.accelerator.wait_for_everyone()
        set_seed(self.config.seed, device_specific=True)
        evaluate_teachers(self)
        if resume_from is not None:
            checkpoint_store.load(self.accelerator, resume_from, self._state)
            self._restore_best(resume_from)

    def _restore_best(self, resumed: Path) -> None:
        """Restore damaged checkpoints; where the best is lost, the resumed epoch replaces it."""
        if self.output_dir is not None:
            last = self.output_dir / "checkpoints" / "last"
            checkpoint_store.restore(self.accelerator, resumed, last)
        if checkpoint_store.restore_best(self.accelerator, resumed, self.output_dir, self.best):
            return
        replace_lost_best(self)
        checkpoint_store.restore_best(self.accelerator, resumed, self.output_dir, self.best)

    def _stop_after_signal(self, exchange_now: bool = False) -> None:
        """Set `stop` if a signal came; all ranks call it."""
        if self.stop_signal.is_received(self.clock.step, exchange_now=exchange_now):
            self.stop = INTERRUPTED

    def _save_and_interrupt(self) -> None:
        folder = self.save("last")
        saved = "nothing was saved: no output_dir was given"
        if folder is not None:
            saved = f"saved to {folder}; continue with resume='auto'"
        self._interrupt(f"at step {self.clock.step} of {self.clock.total_steps}", saved)

    def _interrupt(self, where: str, saved: str) -> None:
        number = self.stop_signal.number
        folder = self.output_dir / "checkpoints" / "last" if self.output_dir is not None else None
        message = f"stopped {where}{by_signal(number)}; {saved}"
        raise Interrupted(message, number, folder, on_all_ranks=True)

    def _describe_last(self) -> str:
        """Which checkpoint a run that ends now leaves, and how to continue."""
        if self.output_dir is None:
            return "nothing was saved: no output_dir was given"
        last = self.output_dir / "checkpoints" / "last"
        found = checkpoint.read_metadata(last)
        if not found:
            return "nothing was saved yet; start again with resume='auto'"
        position = checkpoint.describe_position(found)
        return f"{last} ({position}) is whole; continue with resume='auto'"

    def _finish(self) -> None:
        self.emit("on_fit_end")
        self.metrics_log.write_summary()

    def close(self) -> None:
        """Take this run's objects out of the accelerator."""
        self.accelerator.free_memory()

    # ------------------------------------------------------------------------------------- batches
    def prepare_batch(self, batch: Any, train: bool) -> Batch:
        """Augment a raw batch and lay it out as the networks expect it.

        Args:
            batch: A batch of a loader, on the device.
            train: Whether to augment.
        """
        views = self.method.num_views if train else 1
        finished: Batch = self.data.prepare_batch(
            batch, epoch=self.clock.epoch, train=train, views=views
        )
        if self.config.channels_last and finished["x"].dim() == 4:
            finished["x"] = finished["x"].contiguous(memory_format=torch.channels_last)
        return finished

    @contextlib.contextmanager
    def first_batches(self, count: int) -> Iterator[Iterator[Any]]:
        """The first raw batches of the run, which it will read again.

        Args:
            count: How many.
        """
        with preserve_random_state(), self.sampler_state.preserved():
            self.data.set_epoch(0)
            self.loader.set_epoch(0)
            self.seed_step(0, -1)
            try:
                yield itertools.islice(self.loader, count)
            finally:
                with contextlib.suppress(ValueError):  # it was read to its end
                    self.loader.end()

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        """This rank's batches of a split, for evaluation.

        Args:
            split: The split to read.
        """
        return self.evaluator.batches(split)

    # ---------------------------------------------------------------------------- parts of a step
    @property
    def _ranks_per_batch(self) -> int:
        """Processes that share a batch."""
        return 1 if self.method.networks_per_process else self.accelerator.num_processes

    def seed_step(self, epoch: int, step: int) -> None:
        """Seed dropout and other draws of a step, from (seed, rank, epoch, step) alone.

        A resumed run makes the same draws.

        Args:
            epoch: Finished epochs.
            step: Batches since the start; -1 before the first batch of an epoch.
        """
        rank = 0 if self.method.networks_per_process else self.accelerator.process_index
        torch.manual_seed(derive_seed(self.config.seed, rank, epoch, step))

    def emit(self, event: Event, *args: Any) -> None:
        """Call an event of every callback, in their order.

        Args:
            event: Name of the event.
            *args: What the event gets after the run.
        """
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    def _callback_losses(self, step: Step, batch: Batch) -> dict[str, Tensor]:
        """The losses that callbacks add."""
        extra: dict[str, Tensor] = {}
        for callback in self.callbacks:
            returned = callback.on_losses(self, step, batch)
            losses = {} if returned is None else loss_checks.check_losses(returned, owner(callback))
            taken = [name for name in losses if name in extra or name in step.losses]
            if taken:
                raise ValueError(
                    f"callback {type(callback).__name__} returns the loss {taken[0]!r}, "
                    "which exists already: give it another name"
                )
            extra |= losses
            self.loss_owners |= dict.fromkeys(losses, owner(callback))
        return extra

    def _clip_gradients(self) -> None:
        if self.config.grad_clip is None:
            return
        self.accelerator.unscale_gradients()
        for parameters in self.method.clip_groups():
            torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)

    # ----------------------------------------------------------------------- checkpoints and checks
    def save(self, name: str = "last") -> Path | None:
        """Write a checkpoint if everything is finite; all ranks call it.

        Args:
            name: Name of its folder in `checkpoints/`.

        Returns:
            The folder; None without an output folder.

        Raises:
            NonFiniteLoss: If a loss or a weight is nan or infinite.
        """
        self.check_finite(weights=True)
        if self.output_dir is None:
            return None
        folder = self.output_dir / "checkpoints" / name
        self.sync(self.optimizer)
        self.loss_tracker.average_over_ranks()
        metadata = self.checkpoint_metadata | self._position()
        checkpoint_store.save(self.accelerator, folder, metadata, self._state)
        return folder

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Exchange networks that processes train on their own; all ranks call it.

        Args:
            optimizer: Its state is exchanged too, where it is given.
        """
        self.method.sync(optimizer)
        for callback in self.callbacks:
            callback.sync()

    def check_finite(self, weights: bool = False) -> None:
        """Check that every loss so far was finite.

        Args:
            weights: Check the weights too.

        Raises:
            NonFiniteLoss: If a loss, or a weight, is nan or infinite; it names the term and the
                step.
        """
        found = checks.find_non_finite_loss(self.loss_tracker, self.loss_owners)
        if found is None and weights:
            found = checks.find_non_finite_weight(self.method, self.clock.step)
        if found is not None:
            raise checks.non_finite_error(found, self.clock.epoch, self.output_dir)

    # -------------------------------------------------------------------------------------- metrics
    @property
    def teacher_metrics(self) -> dict[str, dict[str, float]]:
        """`{"teacher/<split>": {"top1": ...}}`, accuracies in percent."""
        return self.evaluator.teacher_metrics

    @property
    def teacher_chance(self) -> dict[str, ChanceLevel]:
        """`{"teacher/<split>": ...}`: what answers reach that do not depend on the image."""
        return self.evaluator.teacher_chance

    def export_candidates(self) -> ExportCandidates:
        """Names of the networks one of which is exported, and the reason for these.

        Those of the first callback that names some, else those of the method.
        """
        for callback in self.callbacks:
            found = callback.export_candidates()
            if found:
                return found
        return self.method.export_candidates()

    def _position(self) -> dict[str, int]:
        return {"epoch": self.clock.epoch, "step": self.clock.step}

    def _highest_lr(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _log_losses(self) -> None:
        self.check_finite()
        row = {"lr": self._used_lr} | self.loss_tracker.close_interval()
        self.metrics_log.add(event="train", **self._position(), **row)

    def _evaluate(self, is_last: bool) -> dict[str, float]:
        """Evaluate after an epoch and remember the best network; see `update_best`."""
        return update_best(self, evaluate_epoch(self, is_last))
