"""distill(): from names and numbers to a student."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch import nn

from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.callbacks.keep_frozen import KeepFrozen
from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.callbacks.trackers import Trackers, resolve_trackers
from kdtoolkit.core.callback import Callback, RunPreview, ordered_callbacks
from kdtoolkit.core.config import SHARED, TrainerConfig
from kdtoolkit.pipeline import build, describe, export, teacher_finetune
from kdtoolkit.pipeline.build import TEMPERATURE, DataInfo, RunParts
from kdtoolkit.pipeline.plan import Plan
from kdtoolkit.trainer.metrics_log import MetricsRow, describe_environment
from kdtoolkit.trainer.optim import make_loader_and_schedule
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.types import LossWeight
from kdtoolkit.utils import checkpoint
from kdtoolkit.utils.io import write_json, write_yaml
from kdtoolkit.utils.state import preserve_accelerate_state, preserve_random_state


@dataclass
class DistillResult:
    """What a run leaves.

    student     the product of the run, bare: on the CPU, in eval mode, no hooks, no adapters
    networks    {name: network} of every network that was trained or averaged, bare: "student", "peer1", "ema", ...
    metrics     top1, top5, loss, ece, teacher_top1, agreement, retention = top1 / teacher_top1, cost and compression
                (with retention_above_chance) of the chosen epoch; accuracies in percent; "split", "epoch" and "chosen"
                ("last" or "best") say which numbers they are; teacher_finetuned_top1, _split, _epoch, _folder and
                _reused (found in teacher_dir) of a teacher that got a new head
                metrics["exported"] names the network that these are of, "exported_reason" says why it is handed over,
                and "networks" holds the top1 of every network and ensemble, where there are several
    history     the rows of metrics.jsonl
    plan        taps, shapes, adapters, losses, weights, parameter counts; printable
    output_dir  the folder, or None
    """

    student: nn.Module
    networks: dict[str, nn.Module] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[MetricsRow] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    output_dir: Path | None = None


def distill(
    teacher: Any,
    student: Any,
    train_data: Any,
    eval_data: Any = None,
    *,
    method: Any = "kd",
    layers: Any = "auto",
    losses: Mapping[str, LossWeight] | None = None,
    temperature: float = TEMPERATURE,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 128,
    optimizer: str = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    scheduler: str = "cosine",
    warmup_epochs: float = 0,
    transforms: Any = None,
    num_classes: int | None = None,
    callbacks: Sequence[Callback] = (),
    teacher_head: str | Sequence[str | None] | None = None,
    teacher_dir: str | os.PathLike[str] | None = None,
    teacher_training: Mapping[str, Any] | None = None,
    freeze: int | str | Sequence[str] | None = None,
    layer_decay: float | None = None,
    student_weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    teacher_weights: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] = False,
    overwrite: bool = False,
    report_to: str | list[str] | None = "auto",
    mixed_precision: str | None = None,
    grad_accum: int = 1,
    compile: bool = False,
    channels_last: bool | str = "auto",
    grad_clip: float | None = None,
    keep: str = "exported",
    seed: int = 0,
    num_workers: int | str = "auto",
    accelerator: Accelerator | None = None,
    dry_run: bool = False,
    progress: str | bool = "auto",
    validation: Any = "auto",
    data_path: str | os.PathLike[str] | None = None,
    train_limit: int | None = None,
    labelled: int | float | None = None,
    image_size: int | None = None,
    momentum: float = 0.9,
    milestones: Sequence[float] = (0.5, 2 / 3, 5 / 6),
    gamma: float = 0.1,
    log_every: int = 50,
    eval_every: int = 1,
    eval_test: str = "auto",
    student_args: Mapping[str, Any] | None = None,
    teacher_args: Mapping[str, Any] | Sequence[Any] | None = None,
    baseline: Any = None,
    label: str = "",
    **method_options: Any,
) -> DistillResult:
    """Train `student` from `teacher` on `train_data`; returns the student, its numbers and its folder.

    teacher      nn.Module, timm name, "local-dir:PATH", "hf-hub:ID", PATH.safetensors, a list of these, or None
    student      the same, without the list; a name without a weight tag starts from random weights. A source of other
                 classes than the data keeps its weights and gets a new head
    train_data   HF Dataset, DatasetDict or IterableDataset, torch Dataset, DataLoader, preset ("cifar100", "digits"),
                 Hub name, folder of parquet or of images. Images stay in [0, 1]: each model normalises its own input
    eval_data    the test set; default the data's own test split
    method       a name of list_methods(), several names, Objectives, or a Method (then student and teacher are its own
                 or None); "none" is plain training (teacher=None)
    layers       "auto" or [(student tap, teacher tap), ...], taps being stage numbers (from 1) or module names
    losses       {loss: weight}, the whole sum; a weight may be a schedule; default the method's own
    temperature  of KD, no unit; methods of several networks have their papers' own where it is not given
    epochs       passes over the training data (default 30), or max_steps optimizer steps
    batch_size   images per optimizer step, over all processes and accumulation steps; a DataLoader keeps its own
    grad_accum   forward and backward passes that share one optimizer step; default 1
    optimizer    "sgd" (plain momentum, decay on all parameters), "nesterov", or a name of timm; lr defaults to 0.05 for
                 these two and 1e-3 for others, weight_decay to 5e-4 and 0.05; `momentum` in [0, 1), default 0.9
    scheduler    "cosine", "multistep" (times `gamma` at `milestones`, shares of the run), "onecycle", "linear",
                 "constant"
    warmup_epochs  epochs, or a part of one, in which the learning rate rises to lr; default 0
    grad_clip    largest norm of the gradient; default None, no clipping
    keep         networks to save: "exported" (student/), or "all" (the others in networks/); all are in result.networks
    seed         of first weights, data order, augmentation and dropout; your own random state is left as it was
    transforms   None (as the preset, or by the images' sizes), "none", "crop-flip", a BatchAugment, a callable on a PIL
                 image, or a pair of these for training and evaluation
    num_classes  classes of the data, where it does not say itself
    image_size   images are resized to this many pixels a side; default the data's own size
    data_path    folder of a local copy of a preset's data
    train_limit  train on this many images only; default all
    labelled     rows (a number) or share of the training rows that keep their labels, drawn by class; the others are
                 unlabelled, which only some methods ("mean_teacher") can use. Rows with label -1 are unlabelled too
    num_workers  processes that read data, a number; "auto" is 0 for data in memory, else up to 8
    validation   "auto" (the data's own split, else 10 % of the training rows, at most 5,000), a share, a number of
                 rows, "none" (the last epoch is taken), or "test" (the best epoch is chosen on the test set: say so)
    eval_every   epochs between two evaluations; the last epoch is always evaluated
    eval_test    evaluate the test set at "every" evaluation, or at the "end"; "auto" is "end" with a validation split
    teacher_head what to do with a teacher that was made for other data: "finetune" trains it (of your own module: a
                 copy) on the data first, with a new head where its classes differ, "linear-probe" only the head;
                 "feature-only" uses its features and not its logits; "as-is" insists that the classes are the same; a
                 list says it for each of several teachers
    teacher_training  {argument: value} of distill() for that training alone; the others are those of this run, save
                 freeze and layer_decay
    teacher_dir  folder of fine-tuned teachers, where a run finds those that an earlier one made of the same network,
                 data and settings; default output_dir/finetuned
    freeze       what of the student is not trained: a number of stages from the image, names of modules, or "backbone"
                 (all but the classifier); its BatchNorm statistics stay too
    layer_decay  factor of the student's learning rate from one layer to the next towards the image, above 0 to 1;
                 default None, the same rate everywhere
    student_weights, teacher_weights  .safetensors, .pth or .pt file, folder, "hf-hub:ID" or state dict for a network
                 given by name or as a module (of a teacher's: a copy); with several teachers a list
    student_args, teacher_args  {option: value} for the constructors of networks that are given by name, such as
                 img_size and patch_size, to which timm resamples weights; for several teachers also a list
    output_dir   folder of checkpoints, student/, metrics.jsonl and report.md; default None, nothing is written
    overwrite    True empties an output_dir that holds another run
    resume       "auto" goes on where output_dir stopped, if it holds a run; True insists; or a checkpoint's folder
    baseline     a finished plain run of the same student (DistillResult or folder) that the report shows beside this
                 one, or True to train it first, in output_dir/baseline
    accelerator  your own; it trains with the accumulation, data splitting and seeds of this run and is given back as
                 it was
    mixed_precision  "no", "fp16" or "bf16"; default None, accelerate's own setting
    compile      True compiles the networks with torch.compile
    channels_last  memory layout of images and weights; "auto" for networks with 2-D convolutions
    callbacks    kdtoolkit.Callback objects, called at each event of the loop by their `order`, else as they are listed
    report_to    trackers, such as "tensorboard" or a list; "auto" is TensorBoard where it is installed and
                 output_dir is given; "none" is none
    progress     "auto" (a bar on a terminal, else lines), "bar", "lines", "off", True or False
    label        word in front of what is printed
    log_every    batches between two rows of losses in metrics.jsonl
    dry_run      stop after the plan: no weights, no data
    method_options  options of the losses, e.g. reset=, detach=, hint=, p=; an unknown one is an error

    Raises ValueError for anything that cannot work, before training and before anything is written; NonFiniteLoss,
    CheckpointError and Interrupted during it: the last good checkpoint is kept. student/ is saved before the report.
    """
    given = {name: value for name, value in locals().items() if name != "method_options"}
    with (
        preserve_random_state(),
        preserve_accelerate_state(accelerator),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _distill(given, method_options)


def _distill(given: dict[str, Any], method_options: Mapping[str, Any]) -> DistillResult:
    losses = build.check_names(given, method_options, list(given))
    given["temperature"] = build.temperature_of(given)
    settings = TrainerConfig.of(given)
    teacher_finetune.settings_of(given)
    folder = Path(given["output_dir"]) if given["output_dir"] is not None else None
    trackers = [] if given["dry_run"] else resolve_trackers(given["report_to"], folder is not None)
    log = _log(given, folder)
    resume_from = (
        None
        if given["dry_run"]
        else checkpoint.claim_output_dir(folder, given["resume"], given["overwrite"])
    )
    ready = None if given["dry_run"] else _accelerator(given, settings, trackers, folder)
    facts = DataInfo.of(given)
    parts = build.build(given, losses, method_options, facts)
    parts.notes += [teacher_finetune.told(given)] if parts.to_adapt else []
    try:
        settings = _placed(settings, given, parts, facts)
        plan = describe.plan_of(parts, facts, settings, given["callbacks"])
        build.check_run(parts.method, facts.data, settings.compile)
        ordered = ordered_callbacks(parts.method, given["callbacks"])
        for callback in ordered:
            callback.check(RunPreview(parts.method, facts.data, settings, ordered))
        if ready is None:
            return DistillResult(parts.net, parts.method.networks(), plan=plan, output_dir=folder)
        ranks = 1 if parts.method.networks_per_process else ready.num_processes
        make_loader_and_schedule(settings, facts.data, ranks, parts.method.batch_sampler)
        if folder is not None and resume_from is None:
            _empty(folder, ready)
        if log.mode != "off" and ready.is_main_process:
            print(*parts.notes, sep="\n", end="\n" if parts.notes else "")
        alone = _baseline(given, facts)
        if parts.to_adapt:
            nets, extra, notes = teacher_finetune.adapted(given, parts, facts, distill, ready)
            parts = build.build(given, losses, method_options, facts, nets)
            parts.extra, plan["notes"] = extra, [*plan["notes"], *notes]
        options = build.resolved(given["method"], method_options)
        config = describe.config_of(given, options, losses, settings, ordered)
        watchers: list[Callback] = [Checkpoints(), log, *([Trackers(config)] if trackers else [])]
        watchers += [KeepFrozen(parts.still)] if parts.still is not None else []
        card = describe.card_of(
            given, options, losses, [teacher.model for teacher in parts.teachers], ordered
        )
        callbacks = [*given["callbacks"], *watchers]
        run = Trainer(
            parts.method, facts.data, settings, ready, callbacks, folder, card, parts.layers
        )
        try:
            if resume_from is not None:
                checkpoint.check_metadata(resume_from, run.checkpoint_metadata)
            if folder is not None and ready.is_main_process:
                write_yaml(folder / "config.yaml", config)
                write_json(folder / "env.json", describe_environment(ready))
                write_json(folder / "plan.json", plan)
            run.fit(resume_from)
            chosen = export.choose(run)
            trained, (name, why) = export.networks(run), export.product(run)
            parts.net = trained[name]
            export.keep(run, trained, name, facts, given["keep"] == "all")
            final = export.measure(run, parts, facts, chosen, name, why)
        finally:
            run.close()
    finally:
        parts.release()
    bare = {name: export.bare(net) for name, net in trained.items()}
    result = DistillResult(export.bare(parts.net), bare, final, run.metrics_log.rows, plan, folder)
    if folder is not None and ready.is_main_process:
        export.report(folder, parts, alone, facts)
    log.on_result(final)
    ready.wait_for_everyone()
    return result


def _log(given: Mapping[str, Any], folder: Path | None) -> ProgressLog:
    """The printer of this run, after a look at the arguments that only distill() knows."""
    if given["keep"] not in ("exported", "all"):
        raise ValueError(f"keep={given['keep']!r}; allowed: 'product', 'all'")
    progress = given["progress"]
    progress = {True: "auto", False: "off"}[progress] if isinstance(progress, bool) else progress
    log = ProgressLog(progress, label=given["label"])
    for callback in given["callbacks"]:
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks holds {callback!r}: each must be a kdtoolkit.Callback, made by calling its class"
            )
    if given["baseline"] is True and (folder is None or not isinstance(given["student"], str)):
        raise ValueError(
            "baseline=True trains the student alone first: it needs output_dir and a student given by name"
        )
    return log


def _placed(
    s: TrainerConfig, given: Mapping[str, Any], parts: RunParts, facts: DataInfo
) -> TrainerConfig:
    """Settings that depend on the models and the data."""
    # accelerate cannot load tied weights that lie channels_last
    tied = len(list(parts.net.named_parameters(remove_duplicate=False))) > len(
        list(parts.net.parameters())
    )
    convolutional = any(isinstance(m, nn.Conv2d) for m in parts.net.modules()) and not tied
    last = convolutional if given["channels_last"] == "auto" else bool(given["channels_last"])
    if facts.data is None:
        return replace(s, channels_last=last)
    own = getattr(
        facts.data.train.own_loader, "batch_size", None
    )  # a DataLoader keeps its batch size
    size = own * s.grad_accum if own else s.batch_size
    return replace(
        s,
        channels_last=last,
        batch_size=size,
        monitor="val" if facts.data.val is not None else None,
    )


def _accelerator(
    given: Mapping[str, Any], s: TrainerConfig, trackers: list[str], folder: Path | None
) -> Accelerator:
    """The caller's, set up for this run, or one with a fresh state: accelerate keeps one state per process."""
    own, precision = given["accelerator"], given["mixed_precision"]
    loading = DataLoaderConfiguration(
        split_batches=True, use_seedable_sampler=True, data_seed=s.seed, non_blocking=True
    )
    if own is not None:
        if precision not in (None, own.mixed_precision):
            raise ValueError(
                f"mixed_precision={precision!r}, but the accelerator has {own.mixed_precision!r}"
            )
        if trackers and not own.log_with:
            raise ValueError(
                f"report_to={trackers} and an accelerator without trackers: give it log_with={trackers}"
            )
        own.gradient_accumulation_steps = s.grad_accum
        own.dataloader_config = loading
        return own
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(
        mixed_precision=precision,  # type: ignore[arg-type]
        gradient_accumulation_steps=s.grad_accum,
        dataloader_config=loading,
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=str(folder / "trackers") if folder else None,
    )


def _empty(folder: Path, accelerator: Accelerator) -> None:
    """Make the folder ready; every rank has looked into it before."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.clear_output_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


# --------------------------------------------------------------------------------------------------------- other runs
def _baseline(given: Mapping[str, Any], facts: DataInfo) -> Path | None:
    """The folder of the same student trained alone."""
    baseline = given["baseline"]
    if baseline is None or baseline is False:
        return None
    if isinstance(baseline, DistillResult):
        return baseline.output_dir
    if baseline is not True:
        return Path(baseline)
    folder = Path(given["output_dir"]) / "baseline"
    own = ("student", "student_args", "student_weights", "freeze", "layer_decay")
    same = {name: given[name] for name in (*SHARED, *own)}
    distill(
        None,
        method="none",
        train_data=facts.data,
        output_dir=folder,
        resume="auto",
        label="alone",
        **same,
    )
    return folder
