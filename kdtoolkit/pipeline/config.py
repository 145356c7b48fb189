"""`DistillConfig`: the whole configuration of a run, typed, frozen and validated once.

`distill()` builds it from its keywords, the command line from flags, and `read_config` from the
`config.yaml` that a run leaves. None stands for a default that is resolved later, once: what it
became stands in the plan and in the run's `config.yaml`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from kdtoolkit.core.config import PAPER_OPTIMIZERS, TrainerConfig
from kdtoolkit.pipeline import config_types as types
from kdtoolkit.pipeline.config_checks import check_fields, with_plain_numbers
from kdtoolkit.pipeline.output_paths import check_output_paths, with_home_folders
from kdtoolkit.utils.registry import suggestion
from kdtoolkit.utils.validation import check_choice

if TYPE_CHECKING:
    from typing_extensions import Self

TEACHER_HEADS = ("finetune", "linear-probe", "feature-only", "as-is")


@dataclass(frozen=True)
class NetworksConfig:
    """Teacher and student: where they come from, and what of them is trained.

    Attributes:
        teacher: timm name, "local-dir:PATH", "hf-hub:ID", PATH.safetensors, `nn.Module`, a list of
            these, or none for plain training and for strategies whose networks teach each other.
        student: The network to train: as `teacher`, without the list. A name without a weight tag
            starts from random weights; a source of other classes than the data keeps its weights
            and gets a new head.
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
    """

    teacher: types.TeacherSource = None
    student: types.NetworkSource = None
    teacher_head: types.TeacherHead = None
    teacher_dir: types.OptionalPath = None
    teacher_training: types.Options = None
    allow_weak_teacher: bool = False
    freeze: types.Freeze = None
    student_weights: types.WeightsSource = None
    teacher_weights: types.TeacherWeightsSource = None
    student_args: types.Options = None
    teacher_args: types.TeacherOptions = None


@dataclass(frozen=True)
class DataConfig:
    """Images and labels: where they come from, which rows are used, how they are augmented.

    Attributes:
        train_data: Hugging Face `Dataset`, `DatasetDict` or `IterableDataset`, torch `Dataset`,
            `DataLoader`, a known name ("cifar10", "cifar100", "digits", ...), a Hub name, or a
            folder of parquet files or of images.
        eval_data: The test set. Default: the data's own test split.
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
    """

    train_data: types.DataSource = "digits"
    eval_data: types.DataSource = None
    data_path: types.OptionalPath = None
    num_classes: types.OptionalWhole = None
    validation: types.Validation = "auto"
    transforms: types.Transforms = None
    image_size: types.OptionalWhole = None
    background: types.Background = None
    channels: types.Whole = 3
    pixel_range: types.PixelRange = None
    train_limit: types.OptionalWhole = None
    labelled: types.Labelled = None
    num_workers: types.Workers = "auto"
    columns: types.Columns = None


@dataclass(frozen=True)
class LossConfig:
    """What is learned from the teacher, the labels and the other networks.

    Attributes:
        method: A name that `kdtoolkit methods` lists, several names (losses, or losses beside one
            strategy), `DistillationLoss` objects, or a `Method` (its networks are student and
            teacher then); "none" is plain training.
        layers: Pairs of taps (student, teacher), taps being stage numbers from 1 or module names;
            "auto" pairs stages.
        losses: The whole sum, as loss=weight; a weight may be a schedule (`kdtoolkit.schedules`).
            Default: the method's own.
        temperature: Softening of probabilities, no unit. Default: 4 for KD; strategies have their
            papers' own.
        options: Options of the method's losses, e.g. reset=[2,3] detach=False; in Python they are
            keywords of `distill()`.
    """

    method: types.MethodSource = "kd"
    layers: types.Layers = "auto"
    losses: types.Weights = None
    temperature: types.OptionalReal = None
    options: types.Options = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """How long and with which optimizer the student is trained.

    Attributes:
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
    """

    epochs: types.OptionalWhole = None
    max_steps: types.OptionalWhole = None
    batch_size: types.Whole = 128
    grad_accum: types.Whole = 1
    optimizer: str = "sgd"
    lr: types.OptionalReal = None
    weight_decay: types.OptionalReal = None
    momentum: types.Real = 0.9
    scheduler: Literal["cosine", "multistep", "onecycle", "linear", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 2 / 3, 5 / 6)
    gamma: types.Real = 0.1
    warmup_epochs: types.Real = 0
    grad_clip: types.OptionalReal = None
    layer_decay: types.OptionalReal = None


@dataclass(frozen=True)
class LoopConfig:
    """How the training loop runs, and what it reports while it does.

    Attributes:
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
    """

    seed: types.Whole = 0
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    compile: bool = False
    channels_last: types.Auto = "auto"
    log_every: types.Whole = 50
    eval_every: types.Whole = 1
    eval_test: Literal["auto", "every", "end"] = "auto"
    report_to: types.Trackers = "auto"
    progress: types.Auto = "auto"
    label: str = ""
    rank_timeout: types.Real = 60.0


@dataclass(frozen=True)
class OutputConfig:
    """The folder of the run, and what is kept in it.

    Attributes:
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
    """

    output_dir: types.OptionalPath = None
    resume: types.Resume = False
    overwrite: bool = False
    keep: Literal["exported", "all"] = "exported"
    baseline: types.Baseline = None
    figures: bool = True

    def __post_init__(self) -> None:
        for name, value in check_output_paths(self.output_dir, self.resume, self.baseline).items():
            object.__setattr__(self, name, value)
        if self.keep == "product":  # type: ignore[comparison-overlap]
            warnings.warn("keep='product' is keep='exported' now", DeprecationWarning, stacklevel=5)
            object.__setattr__(self, "keep", "exported")
        check_choice("keep", self.keep, ("exported", "all"))


@dataclass(frozen=True)
class DistillConfig:
    """The whole configuration of a run, in six parts. Immutable; validated when it is made.

    Attributes:
        networks: Teacher and student.
        data: Images and labels.
        loss: What is learned.
        optim: How long and with which optimizer.
        loop: How the training loop runs.
        output: The folder of the run.

    Raises:
        ValueError: For a value that is not allowed, with what is.

    Example:
        >>> config = DistillConfig.from_keywords(
        ...     student="cifar_resnet8", train_data="digits", method="none", epochs=2
        ... )
        >>> config.optim.epochs, config.trainer.lr
        (2, 0.05)
    """

    networks: NetworksConfig = field(default_factory=NetworksConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        for part in fields(self):
            own, kind = getattr(self, part.name), part.default_factory
            if not isinstance(own, kind):  # type: ignore[arg-type]
                raise ValueError(f"{part.name} is {own!r}; allowed: a {kind.__name__}")  # type: ignore[union-attr]
            object.__setattr__(self, part.name, with_home_folders(with_plain_numbers(own)))
        check_fields(self)
        _ = self.trainer  # its numbers are checked as they are resolved

    @cached_property
    def trainer(self) -> TrainerConfig:
        """The numbers of the training loop, every default resolved."""
        optim, loop = self.optim, self.loop
        papers = isinstance(optim.optimizer, str) and optim.optimizer in PAPER_OPTIMIZERS
        default_lr, default_decay = (0.05, 5e-4) if papers else (1e-3, 0.05)
        unlimited = optim.epochs is None and optim.max_steps is None
        return TrainerConfig(
            epochs=30 if unlimited else optim.epochs,
            max_steps=optim.max_steps,
            batch_size=optim.batch_size,
            optimizer=optim.optimizer,
            lr=default_lr if optim.lr is None else optim.lr,
            weight_decay=default_decay if optim.weight_decay is None else optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            scheduler=optim.scheduler,
            milestones=tuple(optim.milestones),
            gamma=optim.gamma,
            warmup_epochs=optim.warmup_epochs,
            grad_accum=optim.grad_accum,
            grad_clip=optim.grad_clip,
            compile=loop.compile,
            seed=loop.seed,
            log_every=loop.log_every,
            eval_every=loop.eval_every,
            eval_test=loop.eval_test,
        )

    @classmethod
    def from_keywords(cls, **keywords: Any) -> Self:
        """The configuration of flat keywords, as `distill()` takes them.

        Args:
            **keywords: Fields of the six parts; their names are unique. Other names are options of
                the method.

        Returns:
            The configuration.
        """
        return cls().updated(**keywords)

    def updated(self, **keywords: Any) -> Self:
        """A copy with some fields replaced.

        Args:
            **keywords: Fields of the six parts; other names are options of the method.

        Returns:
            The changed configuration, validated.
        """
        parts: dict[str, dict[str, Any]] = {}
        options = dict(self.loss.options or {})
        for name, value in keywords.items():
            if name in FIELD_PART:
                parts.setdefault(FIELD_PART[name], {})[name] = value
            else:
                options[name] = value
        if options != dict(self.loss.options or {}):
            parts.setdefault("loss", {}).setdefault("options", options)
        changed = {part: replace(getattr(self, part), **own) for part, own in parts.items()}
        return replace(self, **changed)

    def changed(self) -> list[str]:
        """Names of the fields that differ from their defaults."""
        defaults = type(self)().flat()
        return [name for name, value in self.flat().items() if _differs(value, defaults[name])]

    def flat(self) -> dict[str, Any]:
        """Field -> value over all parts, the options of the method under "options"."""
        return {name: value for _, name, value in self._values()}

    def _values(self) -> Iterator[tuple[str, str, Any]]:
        for part in fields(self):
            own = getattr(self, part.name)
            for item in fields(own):
                yield part.name, item.name, getattr(own, item.name)


def _differs(value: Any, default: Any) -> bool:
    """Whether a value is another one; objects such as networks and tensors always are."""
    if value is default:
        return False
    if isinstance(default, (int, float)) and isinstance(value, (int, float)):
        return value != default
    plain = (str, tuple, dict)
    return type(value) is not type(default) or type(value) not in plain or value != default


# field -> the part of DistillConfig that it belongs to
FIELD_PART: dict[str, str] = {
    item.name: part.name
    for part in fields(DistillConfig)
    for item in fields(part.default_factory)  # type: ignore[arg-type]
}
FIELD_NAMES = tuple(FIELD_PART)


def check_keywords(keywords: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Check the names of keywords that configure a part of a run.

    Args:
        keywords: Name -> value.
        allowed: Names that may be given.
        where: What they were given to, for the message.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in keywords:
        if name not in allowed:
            hint = suggestion(str(name), allowed) or "."
            raise ValueError(f"{where}: unknown {name!r}{hint} Allowed: {', '.join(allowed)}")
