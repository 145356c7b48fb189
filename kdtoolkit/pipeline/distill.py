"""`distill()`: from names and numbers to a student, in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec

from accelerate import Accelerator

from kdtoolkit.core.callback import Callback
from kdtoolkit.pipeline import config_types as types
from kdtoolkit.pipeline.config import (
    FIELD_NAMES,
    DataConfig,
    DistillConfig,
    LoopConfig,
    LossConfig,
    NetworksConfig,
    OptimConfig,
    OutputConfig,
)
from kdtoolkit.pipeline.config_file import read_callbacks, read_config
from kdtoolkit.pipeline.result import DistillResult
from kdtoolkit.pipeline.run import run_distillation

P = ParamSpec("P")
POSITIONAL = ("teacher", "student", "train_data", "eval_data")  # arguments of distill()


def _reads_config(function: Callable[P, DistillResult]) -> Callable[P, DistillResult]:
    """With `config`, a call runs it; the other arguments of the call replace its values."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> DistillResult:
        arguments: dict[str, Any] = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        config = arguments.pop("config", None)
        if config is None:
            return function(*args, **kwargs)
        callbacks = arguments.pop("callbacks", None)
        accelerator = arguments.pop("accelerator", None)
        dry_run = arguments.pop("dry_run", False)
        own = read_config(config)
        return run_distillation(
            callbacks=read_callbacks(config) if callbacks is None else callbacks,
            accelerator=accelerator,
            dry_run=dry_run,
            config=_replaced(own, arguments),
        )

    return call


def _replaced(config: DistillConfig, arguments: dict[str, Any]) -> DistillConfig:
    """A configuration with the arguments of a call in place of its own values."""
    if "method" in arguments:  # losses, options and temperature of the file belong to its method
        arguments = {"losses": None, "temperature": None, "options": {}} | arguments
    if {"epochs", "max_steps"} & arguments.keys():
        arguments = {"epochs": None, "max_steps": None} | arguments
    options = {name: arguments[name] for name in arguments if name not in FIELD_NAMES}
    fields = {name: arguments[name] for name in arguments if name in FIELD_NAMES}
    return config.updated(**fields).updated(**options)


@_reads_config
def distill(
    teacher: types.TeacherSource = None,
    student: types.NetworkSource = None,
    train_data: types.DataSource = None,
    eval_data: types.DataSource = None,
    *,
    config: types.ConfigSource = None,
    teacher_head: types.TeacherHead = None,
    teacher_dir: types.OptionalPath = None,
    teacher_training: types.Options = None,
    allow_weak_teacher: bool = False,
    freeze: types.Freeze = None,
    student_weights: types.WeightsSource = None,
    teacher_weights: types.TeacherWeightsSource = None,
    student_args: types.Options = None,
    teacher_args: types.TeacherOptions = None,
    data_path: types.OptionalPath = None,
    num_classes: int | None = None,
    validation: types.Validation = "auto",
    transforms: types.Transforms = None,
    image_size: int | None = None,
    background: types.Background = None,
    channels: int = 3,
    pixel_range: types.PixelRange = None,
    train_limit: int | None = None,
    labelled: types.Labelled = None,
    num_workers: types.Workers = "auto",
    columns: types.Columns = None,
    method: types.MethodSource = "kd",
    layers: types.Layers = "auto",
    losses: types.Weights = None,
    temperature: float | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 128,
    grad_accum: int = 1,
    optimizer: str = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    momentum: float = 0.9,
    scheduler: Literal["cosine", "multistep", "onecycle", "linear", "constant"] = "cosine",
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6),
    gamma: float = 0.1,
    warmup_epochs: float = 0,
    grad_clip: float | None = None,
    layer_decay: float | None = None,
    seed: int = 0,
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None,
    compile: bool = False,
    channels_last: types.Auto = "auto",
    log_every: int = 50,
    eval_every: int = 1,
    eval_test: Literal["auto", "every", "end"] = "auto",
    report_to: types.Trackers = "auto",
    progress: types.Auto = "auto",
    label: str = "",
    rank_timeout: float = 60.0,
    output_dir: types.OptionalPath = None,
    resume: types.Resume = False,
    overwrite: bool = False,
    keep: Literal["exported", "all"] = "exported",
    baseline: types.Baseline = None,
    figures: bool = True,
    callbacks: Sequence[Callback] | None = (),
    accelerator: Accelerator | None = None,
    dry_run: bool = False,
    **method_options: Any,
) -> DistillResult:
    """Train `student` from `teacher` on `train_data`.

    The keywords are the fields of `DistillConfig`, flat.

    Args:
        teacher: timm name, "local-dir:PATH", "hf-hub:ID", PATH.safetensors, `nn.Module`, a list of
            these, or none for plain training and for strategies whose networks teach each other.
        student: The network to train: as `teacher`, without the list. A name without a weight tag
            starts from random weights; a source of other classes than the data keeps its weights
            and gets a new head.
        train_data: Hugging Face `Dataset`, `DatasetDict` or `IterableDataset`, torch `Dataset`,
            `DataLoader`, a known name ("cifar10", "cifar100", "digits", ...), a Hub name, or a
            folder of parquet files or of images.
        eval_data: The test set. Default: the data's own test split.
        config: A `DistillConfig`, a mapping, or the path of a YAML file or of a run's folder.
            Arguments that are given beside it replace its values.
        teacher_head: What to do with a teacher of other data: "finetune" trains it on the data
            first (of your own module: a copy), with a new head where its classes differ;
            "linear-probe" only the head; "feature-only" uses its features and not its logits;
            "as-is" insists that the classes are the same. A list says it for each of several
            teachers.
        teacher_dir: Folder of fine-tuned teachers, where a run finds those that an earlier one made
            of the same network, data and configuration. Default: `output_dir/finetuned`.
        teacher_training: Keywords of `distill()` for the fine-tuning of the teacher alone, e.g.
            epochs=3; the others are those of this run, except `freeze` and `layer_decay`.
        allow_weak_teacher: Whether to learn from a teacher that is near chance on the data, which
            is an error otherwise.
        freeze: What of the student is not trained: a number of stages from the image, names of
            modules, or "backbone" (all but the classifier). Its BatchNorm statistics stay too.
        student_weights: .safetensors, .pth, .pt, .bin, .ckpt or .pth.tar file, folder, "hf-hub:ID"
            or state dict for a student given by name or as a module; what matches is taken.
        teacher_weights: The same for the teacher (of a module: a copy is loaded), of which every
            tensor must be found; for several teachers a list.
        student_args: Options of the student's constructor, e.g. img_size=32.
        teacher_args: Options of the teacher's constructor; for several teachers also a list.
        data_path: Folder of a local copy of a data set that is given by name.
        num_classes: Classes of the data, where it does not say itself.
        validation: Rows that choose the best epoch: "auto" (the data's own split, else 10 % of the
            training rows, at most 5,000), a share, a number of rows, "none" (the last epoch is
            taken), or "test" (the best epoch is chosen on the test set).
        transforms: None (as the data set's papers, or by the images' sizes), "none", "crop-flip", a
            `BatchAugment`, a callable on a PIL image for training alone (images for evaluation get
            the default, at the same size), or a pair of callables for training and evaluation.
        image_size: Images are resized to this many pixels a side. Default: the data's own size; 224
            where images differ in size, or are larger than 96 pixels and `transforms` is not given.
            Float images of one size, a callable in `transforms` and a DataLoader keep theirs.
        background: Colour that transparent images are laid on, as a name ("black", "#ff8800") or
            (R, G, B). Default: white; arrays and tensors of four channels are refused.
        channels: Channels of the images that networks get: 3, 1 (grey) or 4 (the fourth is kept);
            networks given by name are built for them.
        pixel_range: Values of black and white of images that are not of 8 bits, e.g. (0, 4095).
            Default: decided for the whole data set, and said in the plan.
        train_limit: Train on this many rows only, drawn by class. Default: all.
        labelled: Number or share of the training rows that keep their labels, drawn by class; the
            others are unlabelled, which only some methods ("mean_teacher") can use. Rows with label
            -1 are unlabelled too. Default: all.
        num_workers: Processes that read data; "auto" is 0 for data in memory, else the processors
            that this process may use, up to 8.
        columns: Columns (image, label) of a Hugging Face data set or parquet files, None for one
            that is to be found. Default: the image by its type, the label by its name (label,
            class, target, ...), else by its type; text becomes classes.
        method: A name that `kdtoolkit methods` lists, several names (losses, or losses beside one
            strategy), `DistillationLoss` objects, or a `Method` (its networks are student and
            teacher then); "none" is plain training.
        layers: Pairs of taps (student, teacher), taps being stage numbers from 1 or module names;
            "auto" pairs stages.
        losses: The whole sum, as loss=weight; a weight may be a schedule (`kdtoolkit.schedules`).
            Default: the method's own.
        temperature: Softening of probabilities, no unit. Default: 4 for KD; strategies have their
            papers' own.
        epochs: Passes over the training data. Default: 30, or as `max_steps` says.
        max_steps: Optimizer steps, in place of `epochs`.
        batch_size: Images per optimizer step, over all processes and accumulation steps; a
            `DataLoader` keeps its own.
        grad_accum: Forward and backward passes that share one optimizer step.
        optimizer: "sgd" (plain momentum, weight decay on all parameters), "nesterov", or a name of
            timm.
        lr: Learning rate, the highest of the schedule. Default: 0.05 for "sgd" and "nesterov", else
            0.001.
        weight_decay: Weight decay. Default: 0.0005 for "sgd" and "nesterov", else 0.05.
        momentum: Momentum, from 0 to below 1.
        scheduler: Learning rate over time; "multistep" multiplies it by `gamma` at the
            `milestones`.
        milestones: Shares of the run, from 0 to 1, for "multistep".
        gamma: Factor of the learning rate at each milestone.
        warmup_epochs: Epochs, or a part of one, in which the learning rate rises to `lr`.
        grad_clip: Largest norm of the gradient. Default: no clipping.
        layer_decay: Factor of the student's learning rate from one layer to the next towards the
            image, above 0 to 1. Default: the same rate everywhere.
        seed: Of first weights, data order, augmentation and dropout; your own random state is left
            as it was.
        mixed_precision: Precision of forward and backward passes. Default: accelerate's own
            setting.
        compile: Compile the networks with `torch.compile`.
        channels_last: Memory layout of images and weights; "auto" for networks with 2-D
            convolutions.
        log_every: Batches between two rows of losses in metrics.jsonl.
        eval_every: Epochs between two evaluations; the last epoch is always evaluated.
        eval_test: Evaluate the test set at "every" evaluation, or at the "end"; "auto" is "end"
            with a validation split.
        report_to: Experiment trackers, such as "tensorboard", or a list; "auto" is TensorBoard
            where it is installed and `output_dir` is given; "none" is none.
        progress: "auto" (a bar on a terminal, else lines), "bar", "lines" or "off"; True is "auto",
            False is "off".
        label: Word in front of what is printed.
        rank_timeout: Seconds after which a process of a run over several that gives no sign of life
            ends the others.
        output_dir: Folder of checkpoints, student/, metrics.jsonl and report.md. Default: nothing
            is written.
        resume: "auto" continues where `output_dir` stopped, or starts if it is empty; True insists;
            or the folder of a checkpoint.
        overwrite: Replace the run that `output_dir` holds: the files that it wrote, and no others,
            go when this run has its first checkpoint.
        keep: Networks to save: "exported" (student/), or "all" (the others in networks/). All are
            in `result.networks`.
        baseline: A finished plain run of the same student (a `DistillResult` or a folder) that the
            report shows beside this one, or True to train it first, in output_dir/baseline.
        figures: Whether the report has figures; they take about a second.
        callbacks: `Callback` objects, called at each event of the loop by their `order`, else as
            they are listed. Beside `config` the default is those that the file names.
        accelerator: Your own `accelerate.Accelerator`; it trains with the accumulation, data
            splitting and seeds of this run and is given back as it was.
        dry_run: Stop after the plan: no weights are loaded; data is opened unless it is a built-in
            name such as "cifar10".
        **method_options: Options of the losses or of the strategy, e.g. `reset=`, `detach=`,
            `hint=`, `p=`; `kdtoolkit methods NAME` lists them.

    Returns:
        The student, every network, metrics, history, plan and folder.

    Raises:
        ValueError: For anything that cannot work, before training and before anything is written.
        NonFiniteLoss: When a loss or a weight is not finite; the last good checkpoint is kept.
        CheckpointError: When a checkpoint cannot be written, or is of another run.
        Interrupted: After Ctrl-C, SIGTERM or SIGHUP, when the run has been saved.
        RankFailed: When another process of the run failed, ended or answers no more.

    Example:
        >>> from kdtoolkit import distill
        >>> plan = distill("cifar_resnet20", "cifar_resnet8", "digits", method="srkd",
        dry_run=True).plan
    """
    keywords = DistillConfig(
        networks=NetworksConfig(
            teacher=teacher,
            student=student,
            teacher_head=teacher_head,
            teacher_dir=teacher_dir,
            teacher_training=teacher_training,
            allow_weak_teacher=allow_weak_teacher,
            freeze=freeze,
            student_weights=student_weights,
            teacher_weights=teacher_weights,
            student_args=student_args,
            teacher_args=teacher_args,
        ),
        data=DataConfig(
            train_data="digits" if train_data is None else train_data,
            eval_data=eval_data,
            data_path=data_path,
            num_classes=num_classes,
            validation=validation,
            transforms=transforms,
            image_size=image_size,
            background=background,
            channels=channels,
            pixel_range=pixel_range,
            train_limit=train_limit,
            labelled=labelled,
            num_workers=num_workers,
            columns=columns,
        ),
        loss=LossConfig(
            method=method,
            layers=layers,
            losses=losses,
            temperature=temperature,
            options=dict(method_options),
        ),
        optim=OptimConfig(
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            grad_accum=grad_accum,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            scheduler=scheduler,
            milestones=milestones,
            gamma=gamma,
            warmup_epochs=warmup_epochs,
            grad_clip=grad_clip,
            layer_decay=layer_decay,
        ),
        loop=LoopConfig(
            seed=seed,
            mixed_precision=mixed_precision,
            compile=compile,
            channels_last=channels_last,
            log_every=log_every,
            eval_every=eval_every,
            eval_test=eval_test,
            report_to=report_to,
            progress=progress,
            label=label,
            rank_timeout=rank_timeout,
        ),
        output=OutputConfig(
            output_dir=output_dir,
            resume=resume,
            overwrite=overwrite,
            keep=keep,
            baseline=baseline,
            figures=figures,
        ),
    )
    if train_data is None:
        raise ValueError("train_data=None: pass a data set, a folder or a name such as 'digits'")
    return run_distillation(keywords, callbacks=callbacks, accelerator=accelerator, dry_run=dry_run)
