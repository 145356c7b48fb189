"""One run, from a configuration to a result: prepare, fit, export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.callbacks.keep_frozen import KeepFrozen
from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.callbacks.trackers import Trackers, resolve_trackers
from kdtoolkit.core.callback import Callback, ordered_callbacks
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.run_context import RunPreview
from kdtoolkit.methods.resolve import ResolvedLosses
from kdtoolkit.pipeline import checks, export
from kdtoolkit.pipeline.accelerator import make_accelerator
from kdtoolkit.pipeline.build import RunParts, build_parts
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import check_no_marks, config_to_plain
from kdtoolkit.pipeline.data_info import DataInfo, read_data
from kdtoolkit.pipeline.describe import checkpoint_metadata
from kdtoolkit.pipeline.plan import Plan, make_plan
from kdtoolkit.pipeline.result import DistillResult
from kdtoolkit.pipeline.teacher_finetune import (
    SHARED_FIELDS,
    describe_finetuning,
    finetune_teachers,
    finetuning_fields,
)
from kdtoolkit.trainer.best_epoch import monitored_split
from kdtoolkit.trainer.environment import describe_environment
from kdtoolkit.trainer.optim import check_optimizer
from kdtoolkit.trainer.run_length import make_loader_and_schedule
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.utils import checkpoint
from kdtoolkit.utils.io import write_json, write_yaml
from kdtoolkit.utils.logging import configure_logging
from kdtoolkit.utils.output_dir import claim_output_dir, clear_output_dir
from kdtoolkit.utils.state import preserve_accelerate_state, preserve_random_state

# fields of a baseline, beside those that every run shares: the same student
SAME_STUDENT = ("student", "student_args", "student_weights", "freeze", "layer_decay")
BASELINE_FIELDS = (*SHARED_FIELDS, *SAME_STUDENT)
logger = logging.getLogger(__name__)


def run_distillation(
    config: DistillConfig,
    *,
    callbacks: Sequence[Callback] = (),
    accelerator: Accelerator | None = None,
    dry_run: bool = False,
) -> DistillResult:
    """Train the student of a configuration.

    The caller's random state and accelerate's are left as they were.

    Args:
        config: The configuration.
        callbacks: Called at each event of the loop, by their `order`, else as they are listed.
        accelerator: The caller's own; None makes one.
        dry_run: Whether to stop after the plan: no weights are loaded; data is opened unless it is
            a built-in name such as "cifar10".

    Returns:
        The student, its numbers and its folder.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state())
        stack.enter_context(preserve_accelerate_state(accelerator))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        request = _check_request(config, callbacks, accelerator, dry_run)
        info = read_data(config, dry_run)
        run = _prepare(request, info)
        try:
            if dry_run:
                nets = run.parts.method.networks()
                return DistillResult(
                    run.parts.student, nets, plan=run.plan, output_dir=request.folder
                )
            return _fit_and_export(run)
        finally:
            run.parts.release()


@dataclass(frozen=True)
class _Request:
    """A configuration that has been checked as far as that needs no data.

    `accelerator` is None in a dry run; `resolved` holds what defaults became.
    """

    config: DistillConfig
    losses: ResolvedLosses | None
    resolved: dict[str, Any]
    callbacks: tuple[Callback, ...]
    progress: ProgressLog
    trackers: list[str]
    folder: Path | None
    resume_from: Path | None
    accelerator: Accelerator | None
    dry_run: bool


@dataclass
class _Prepared:
    """A run that is ready to train."""

    request: _Request
    info: DataInfo
    parts: RunParts
    trainer_config: TrainerConfig
    plan: Plan
    ordered: list[Callback]

    @property
    def accelerator(self) -> Accelerator:
        assert self.request.accelerator is not None
        return self.request.accelerator


def _check_request(
    config: DistillConfig,
    callbacks: Sequence[Callback],
    accelerator: Accelerator | None,
    dry_run: bool,
) -> _Request:
    check_no_marks(config)
    losses = checks.resolve_method(config)
    resolved = _resolved_fields(config, losses)
    check_optimizer(config.trainer.optimizer)
    finetuning_fields(config)
    output = config.output
    folder = Path(output.output_dir) if output.output_dir is not None else None
    trackers = [] if dry_run else resolve_trackers(config.loop.report_to, folder is not None)
    progress = checks.make_progress_log(config)
    if progress.mode != "off":
        configure_logging()
    checks.check_callbacks(callbacks)
    checks.check_baseline(config)
    resume_from = None
    if not dry_run:
        resume_from = claim_output_dir(folder, output.resume, output.overwrite)
    accelerator = None if dry_run else make_accelerator(config, accelerator, trackers, folder)
    return _Request(
        config, losses, resolved, tuple(callbacks), progress, trackers, folder, resume_from,
        accelerator, dry_run,
    )  # fmt: skip


def _resolved_fields(config: DistillConfig, losses: ResolvedLosses | None) -> dict[str, Any]:
    """Field -> what its default became."""
    numbers = ("epochs", "max_steps", "lr", "weight_decay", "batch_size")
    resolved: dict[str, Any] = {name: getattr(config.trainer, name) for name in numbers}
    resolved["temperature"] = checks.resolve_temperature(config, losses)
    resolved["losses"] = {} if losses is None else dict(losses.weights)
    strategy = None if losses is None else losses.strategy
    defaults = {} if strategy is None else dict(strategy.options)
    options = defaults | dict(config.loss.options or {})
    options.pop("temperature", None)
    return resolved | {"options": options}


def _prepare(request: _Request, info: DataInfo) -> _Prepared:
    config = request.config
    parts = build_parts(config, request.losses, info, dry_run=request.dry_run)
    try:
        if parts.to_finetune:
            parts.notes.append(describe_finetuning(config))
        trainer_config = _trainer_config(config, parts, info)
        plan = make_plan(parts, info, trainer_config, request.resolved, request.callbacks)
        checks.check_method_fits_data(parts.method, info.data, trainer_config.compile)
        ordered = ordered_callbacks(parts.method, request.callbacks)
        for callback in ordered:
            callback.check(RunPreview(parts.method, info.data, trainer_config, ordered))
    except BaseException:
        parts.release()
        raise
    return _Prepared(request, info, parts, trainer_config, plan, ordered)


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


def _fit_and_export(run: _Prepared) -> DistillResult:
    request, info, accelerator = run.request, run.info, run.accelerator
    config, folder = request.config, request.folder
    method = run.parts.method
    ranks = 1 if method.networks_per_process else accelerator.num_processes
    # a batch size that does not fit is an error before anything is written
    make_loader_and_schedule(run.trainer_config, info.loaded, ranks, method.batch_sampler)
    if folder is not None and request.resume_from is None:
        _empty_folder(folder, accelerator)
    if request.progress.mode != "off" and accelerator.is_main_process:
        for note in run.parts.notes:
            logger.info("%s", note)
    baseline = _find_or_train_baseline(config, info)
    if run.parts.to_finetune:
        _finetune(run)
    trainer = _make_trainer(run)
    try:
        if request.resume_from is not None:
            checkpoint.check_metadata(request.resume_from, trainer.checkpoint_metadata)
        if folder is not None and accelerator.is_main_process:
            write_yaml(folder / "config.yaml", _plain_config(run))
            write_json(folder / "env.json", describe_environment(accelerator))
            write_json(folder / "plan.json", run.plan)
        trainer.fit(request.resume_from)
        chosen = export.load_chosen_epoch(trainer)
        exported = export.choose_export(trainer)
        run.parts.student = exported.networks[exported.name]
        export.save_networks(trainer, exported, info, every=config.output.keep == "all")
        final = export.measure(trainer, run.parts, info, chosen, exported)
    finally:
        trainer.close()
    run.parts.release()
    networks = {name: export.bare(net) for name, net in exported.networks.items()}
    student = networks[exported.name]
    result = DistillResult(student, networks, final, trainer.metrics_log.rows, run.plan, folder)
    if folder is not None and accelerator.is_main_process:
        export.write_report(folder, run.parts, baseline, info)
    request.progress.on_result(final)
    accelerator.wait_for_everyone()
    return result


def _finetune(run: _Prepared) -> None:
    """Teachers of other classes are trained, and the method is built again around them."""
    config = run.request.config
    nets, extra, notes = finetune_teachers(
        config, run.parts, run.info, run.accelerator, run_distillation
    )
    run.parts = build_parts(config, run.request.losses, run.info, dry_run=False, finetuned=nets)
    run.parts.extra_metrics = extra
    run.plan["notes"] = [*run.plan["notes"], *notes]


def _plain_config(run: _Prepared) -> dict[str, Any]:
    resolved = run.request.resolved | {"batch_size": run.trainer_config.batch_size}
    return config_to_plain(run.request.config, resolved, run.request.callbacks)


def _make_trainer(run: _Prepared) -> Trainer:
    request = run.request
    watching: list[Callback] = [Checkpoints(), request.progress]
    if request.trackers:
        plain = _plain_config(run)
        flat = {k: v for part in plain.values() if isinstance(part, dict) for k, v in part.items()}
        watching.append(Trackers(flat))
    if run.parts.frozen_parts is not None:
        watching.append(KeepFrozen(run.parts.frozen_parts))
    losses = {} if request.losses is None else request.losses.weights
    teachers = [teacher.model for teacher in run.parts.teachers]
    metadata = checkpoint_metadata(request.config, request.resolved, losses, teachers, run.ordered)
    return Trainer(
        run.parts.method, run.info.loaded, run.trainer_config, run.accelerator,
        [*request.callbacks, *watching], request.folder, metadata, run.parts.parameter_layers,
    )  # fmt: skip


def _empty_folder(folder: Path, accelerator: Accelerator) -> None:
    """Make the folder ready; every rank has looked into it before."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        clear_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def _find_or_train_baseline(config: DistillConfig, info: DataInfo) -> Path | None:
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
    alone = DistillConfig.from_keywords(
        method="none", train_data=info.data, output_dir=folder, resume="auto", label="alone", **same
    )
    run_distillation(alone)
    return folder
