"""One run, from a configuration to a result: prepare, fit, export."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.callbacks.keep_frozen import KeepFrozen
from kdtoolkit.callbacks.teacher_check import TeacherCheck
from kdtoolkit.callbacks.trackers import Trackers
from kdtoolkit.core.callback import Callback, ordered_callbacks
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.run_context import RunPreview
from kdtoolkit.data.sampler_state import describe_inexact
from kdtoolkit.pipeline import checks, export
from kdtoolkit.pipeline.batch_checks import check_smallest_batch
from kdtoolkit.pipeline.build import RunParts, build_parts
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import config_to_plain
from kdtoolkit.pipeline.data_info import DataInfo, read_data
from kdtoolkit.pipeline.describe import checkpoint_metadata, describe_data, describe_training
from kdtoolkit.pipeline.finished_run import ReplaceEarlierRun, read_finished_run
from kdtoolkit.pipeline.plan import Plan, make_plan
from kdtoolkit.pipeline.request import Request, check_request
from kdtoolkit.pipeline.result import DistillResult
from kdtoolkit.pipeline.run_phase import RunPhase
from kdtoolkit.pipeline.teacher_finetune import (
    SHARED_FIELDS,
    describe_finetuning,
    finetune_teachers,
)
from kdtoolkit.pipeline.teachers import TRAINED_HEADS, check_head_names
from kdtoolkit.trainer.best_epoch import monitored_split
from kdtoolkit.trainer.environment import describe_environment
from kdtoolkit.trainer.loss_checks import check_schedules
from kdtoolkit.trainer.run_length import make_loader_and_schedule
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.utils import checkpoint
from kdtoolkit.utils.io import write_json, write_yaml
from kdtoolkit.utils.output_folder import OutputFolder, explain_write_errors, open_output_folder
from kdtoolkit.utils.rank_monitor import watch_ranks
from kdtoolkit.utils.signals import explain_interruption, follow_launcher, interrupt_on_stop_signals
from kdtoolkit.utils.state import preserve_accelerate_state, preserve_random_state

# fields of a baseline, beside those that every run shares: the same student
SAME_STUDENT = ("student", "student_args", "student_weights", "freeze", "layer_decay")
BASELINE_FIELDS = (*SHARED_FIELDS, *SAME_STUDENT)
logger = logging.getLogger(__name__)


def run_distillation(
    config: DistillConfig,
    *,
    callbacks: Sequence[Callback] | None = (),
    accelerator: Accelerator | None = None,
    dry_run: bool = False,
) -> DistillResult:
    """Train the student of a configuration.

    The caller's random state and accelerate's are left as they were.

    Args:
        config: The configuration.
        callbacks: Called at each event of the loop, by their `order`, else as they are listed; None
            is none.
        accelerator: The caller's own; None makes one.
        dry_run: Whether to stop after the plan: no weights are loaded; data is opened unless it is
            a built-in name such as "cifar10".

    Returns:
        The student, its numbers and its folder.
    """
    checks.check_call(accelerator, dry_run)
    phase = RunPhase(config.output.output_dir)
    with ExitStack() as stack:
        stack.enter_context(interrupt_on_stop_signals())
        stack.enter_context(explain_interruption(phase.describe))
        follow_launcher()
        stack.enter_context(preserve_random_state())
        stack.enter_context(preserve_accelerate_state(accelerator))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        request = check_request(config, callbacks, accelerator, dry_run)
        if request.accelerator is not None:
            seconds, device = config.loop.rank_timeout, request.accelerator.device
            stack.enter_context(watch_ranks(seconds, device))
        info = read_data(config, dry_run)
        run = _prepare(request, info)
        try:
            if dry_run:
                nets = run.parts.method.networks()
                return DistillResult(
                    run.parts.student, nets, plan=run.plan, output_dir=request.folder
                )
            return _fit_and_export(run, phase)
        finally:
            run.parts.release()


@dataclass
class _Prepared:
    """A run that is ready to train."""

    request: Request
    info: DataInfo
    parts: RunParts
    trainer_config: TrainerConfig
    plan: Plan
    ordered: list[Callback]

    @property
    def accelerator(self) -> Accelerator:
        assert self.request.accelerator is not None
        return self.request.accelerator


def _prepare(request: Request, info: DataInfo) -> _Prepared:
    config = request.config
    parts = build_parts(config, request.losses, info, dry_run=request.dry_run)
    try:
        if parts.to_finetune:
            parts.notes.append(describe_finetuning(config))
        if info.data is not None and request.folder is not None:
            parts.notes += describe_inexact(info.data.train)
        trainer_config = _trainer_config(config, parts, info)
        plan = make_plan(parts, info, trainer_config, request.resolved, request.callbacks)
        plan["changed"] = config.changed()
        checks.check_method_fits_data(parts.method, info.data, trainer_config.compile)
        check_smallest_batch(parts, info.data, trainer_config, _ranks(request, parts))
        ordered = ordered_callbacks(parts.method, request.callbacks)
        preview = RunPreview(parts.method, info.data, trainer_config, ordered)
        for callback in ordered:
            callback.check(preview)
        check_schedules(parts.method, ordered, preview.clock)
    except BaseException:
        parts.release()
        raise
    return _Prepared(request, info, parts, trainer_config, plan, ordered)


def _ranks(request: Request, parts: RunParts) -> int:
    """Processes that share a batch."""
    if request.accelerator is None or parts.method.networks_per_process:
        return 1
    ranks: int = request.accelerator.num_processes
    return ranks


def _trainer_config(config: DistillConfig, parts: RunParts, info: DataInfo) -> TrainerConfig:
    """Numbers of the loop that depend on the networks and the data."""
    wanted = config.loop.channels_last
    channels_last = checks.channels_last_pays(parts.student) if wanted == "auto" else bool(wanted)
    found = replace(config.trainer, channels_last=channels_last)
    if info.data is None:
        return found
    own = getattr(info.data.train.user_loader, "batch_size", None)  # a DataLoader keeps its own
    batch_size = own * found.grad_accum if own else found.batch_size
    return replace(found, batch_size=batch_size, monitor=monitored_split(info.data))


def _fit_and_export(run: _Prepared, phase: RunPhase) -> DistillResult:
    request, info, accelerator = run.request, run.info, run.accelerator
    config, method = request.config, run.parts.method
    ranks = 1 if method.networks_per_process else accelerator.num_processes
    # a batch size that does not fit is an error before anything is written
    made = make_loader_and_schedule(run.trainer_config, info.loaded, ranks, method.batch_sampler)
    check_schedules(method, run.ordered, made.clock)
    with open_output_folder(request.claim, config.output.resume, config.output.overwrite) as output:
        return _train_in_folder(run, phase, output)


def _train_in_folder(run: _Prepared, phase: RunPhase, output: OutputFolder) -> DistillResult:
    request, info, accelerator = run.request, run.info, run.accelerator
    config, folder, resume_from = request.config, request.folder, output.claim.resume_from
    if request.progress.mode != "off" and accelerator.is_main_process:
        for note in [*info.notes, *run.parts.notes]:
            logger.info("%s", note)
    is_finished = output.claim.action == "finished"
    baseline = None if is_finished else _find_or_train_baseline(config, info, output)
    if run.parts.to_finetune:
        _finetune(run, output)
    trainer = _make_trainer(run, output)
    try:
        if is_finished:
            return read_finished_run(trainer, output.settings, run.plan)
        if resume_from is not None:
            checkpoint.check_metadata(resume_from, trainer.checkpoint_metadata)
        with explain_write_errors(folder):
            output.set_settings(trainer.checkpoint_metadata)
            _write_descriptions(run)
        trainer.fit(resume_from)
        output.checkpoint_written()
        phase.is_trained = True
        chosen = export.load_chosen_epoch(trainer)
        exported = export.choose_export(trainer)
        run.parts.student = exported.networks[exported.name]
        with _checkpoint_stays(folder):
            export.save_networks(trainer, exported, info, every=config.output.keep == "all")
        final = export.measure(trainer, run.parts, info, chosen, exported)
    finally:
        trainer.close()
    run.parts.release()
    networks = {name: export.bare(net) for name, net in exported.networks.items()}
    student = networks[exported.name]
    result = DistillResult(student, networks, final, trainer.metrics_log.rows, run.plan, folder)
    if folder is not None and accelerator.is_main_process:
        export.write_report(folder, run.parts, baseline, info, config.output.figures)
    output.finish()
    request.progress.on_result(final)
    accelerator.wait_for_everyone()
    return result


def _write_descriptions(run: _Prepared) -> None:
    """Write the texts that say what is run: config.yaml, env.json and plan.json."""
    folder = run.request.folder
    if folder is not None and run.accelerator.is_main_process:
        write_yaml(folder / "config.yaml", _plain_config(run))
        write_json(folder / "env.json", describe_environment(run.accelerator))
        write_json(folder / "plan.json", run.plan)


@contextlib.contextmanager
def _checkpoint_stays(folder: Path | None) -> Iterator[None]:
    """Say what is kept and how to go on where the student cannot be written."""
    try:
        yield
    except OSError as error:
        if folder is None:
            raise
        last = folder / "checkpoints" / "last"
        raise OSError(
            f"{error}. {last} is whole: continue with resume='auto', which evaluates and saves "
            "the networks again"
        ) from error


def _finetune(run: _Prepared, output: OutputFolder) -> None:
    """Teachers of other classes are trained, and the method is built again around them."""
    config = run.request.config
    nets, extra, notes = finetune_teachers(
        config, run.parts, run.info, run.accelerator, run_distillation
    )
    run.parts = build_parts(config, run.request.losses, run.info, dry_run=False, finetuned=nets)
    run.parts.extra_metrics = extra
    for key, value in extra.items():
        if key.endswith("_finetuned_folder") and value:
            output.add_run(Path(value))
    run.plan["notes"] = [*run.plan["notes"], *notes]


def _plain_config(run: _Prepared) -> dict[str, Any]:
    resolved = run.request.resolved | {"batch_size": run.trainer_config.batch_size}
    return config_to_plain(run.request.config, resolved, run.request.callbacks)


def _teacher_check(run: _Prepared) -> list[Callback]:
    """The check of the teachers, unless the caller allows weak ones."""
    networks = run.request.config.networks
    if networks.allow_weak_teacher:
        return []
    heads = check_head_names(networks)
    unused = [number for number, head in enumerate(heads) if head == "feature-only"]
    finetuned = [number for number, head in enumerate(heads) if head in TRAINED_HEADS]
    return [TeacherCheck(unused, finetuned)]


def _make_trainer(run: _Prepared, output: OutputFolder) -> Trainer:
    request = run.request
    watching: list[Callback] = [Checkpoints(), ReplaceEarlierRun(output), request.progress]
    if request.trackers:
        plain = _plain_config(run)
        flat = {k: v for part in plain.values() if isinstance(part, dict) for k, v in part.items()}
        watching.append(Trackers(flat))
    if run.parts.frozen_parts is not None:
        watching.append(KeepFrozen(run.parts.frozen_parts))
    losses = {} if request.losses is None else request.losses.weights
    teachers = [teacher.model for teacher in run.parts.teachers]
    metadata = checkpoint_metadata(request.config, request.resolved, losses, teachers, run.ordered)
    if request.folder is not None:
        metadata |= {
            "training": describe_training(request.config, str(run.accelerator.mixed_precision)),
            "data": describe_data(request.config, run.info.loaded),
        }
    return Trainer(
        run.parts.method, run.info.loaded, run.trainer_config, run.accelerator,
        [*_teacher_check(run), *request.callbacks, *watching], request.folder, metadata,
        run.parts.parameter_layers,
    )  # fmt: skip


def _find_or_train_baseline(
    config: DistillConfig, info: DataInfo, output: OutputFolder
) -> Path | None:
    """The folder of the same student trained alone; `baseline=True` trains it here."""
    baseline = config.output.baseline
    if baseline is None or baseline is False:
        return None
    if isinstance(baseline, DistillResult):
        return baseline.output_dir
    if baseline is not True:
        return Path(baseline)
    assert config.output.output_dir is not None
    folder = Path(config.output.output_dir) / "baseline"
    values = config.flat()
    same = {name: values[name] for name in BASELINE_FIELDS}
    overwrite = output.claim.action == "replace"
    alone = DistillConfig.from_keywords(
        method="none", train_data=info.data, output_dir=folder, label="alone",
        resume=False if overwrite else "auto", overwrite=overwrite,
        figures=config.output.figures, **same,
    )  # fmt: skip
    run_distillation(alone)
    output.add_run(folder)
    return folder
