"""Teachers of other classes are fine-tuned once, and found again by every run that needs the same.

A fine-tuned teacher lies in a folder named after a digest of all it depends on: the network and its
weights without the old head, `teacher_head`, the data, the configuration of its training and the
seed. The student, the method and places are no part of it.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kdtoolkit.models.describe import describe_model
from kdtoolkit.models.head import classifier_names
from kdtoolkit.pipeline import fingerprint
from kdtoolkit.pipeline.build import RunParts
from kdtoolkit.pipeline.config import DistillConfig, check_keywords
from kdtoolkit.pipeline.data_info import DataInfo
from kdtoolkit.pipeline.networks import untapped
from kdtoolkit.pipeline.teachers import TRAINED_HEADS, check_head_names
from kdtoolkit.utils import distributed
from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.folder_lock import OutputDirInUse, is_in_use
from kdtoolkit.utils.io import write_json
from kdtoolkit.utils.manifest import record_files
from kdtoolkit.utils.output_dir import OutputDirNotEmpty

if TYPE_CHECKING:
    from kdtoolkit.pipeline.result import DistillResult

TrainFunction = Callable[[DistillConfig], "DistillResult"]

logger = logging.getLogger(__name__)

# fields that a run shares with those that it starts: a baseline, the fine-tuning of a teacher
SHARED_FIELDS = (
    "epochs", "max_steps", "batch_size", "optimizer", "lr", "weight_decay", "scheduler",
    "warmup_epochs", "report_to", "mixed_precision", "grad_accum", "compile", "channels_last",
    "grad_clip", "seed", "progress", "momentum", "milestones", "gamma", "log_every", "eval_every",
    "eval_test",
)  # fmt: skip
ALLOWED_FIELDS = (*SHARED_FIELDS, "layer_decay", "freeze")  # what teacher_training may set
WITHOUT_EFFECT = ("report_to", "progress", "log_every", "eval_test")  # on the teacher itself
RESULT_FILE = "finetuned.json"
WAIT_SECONDS = 1.0  # between two looks at a folder in use
RESULT_KEYS = ("top1", "split", "epoch", "chosen")


def finetuning_fields(config: DistillConfig) -> dict[str, Any]:
    """The fields with which teachers are fine-tuned.

    They are those of this run, changed by `teacher_training`.

    `freeze` and `layer_decay` are the student's and are not taken over. An optimizer of its own
    brings its own default learning rate and weight decay; a length of its own replaces the run's.

    Args:
        config: The configuration of the run.

    Returns:
        Field -> value.

    Raises:
        ValueError: For a field that is unknown or has no effect.
    """
    own = dict(config.networks.teacher_training or {})
    heads = [head for head in check_head_names(config.networks) if head in TRAINED_HEADS]
    if own and not heads:
        choices = " or ".join(f"teacher_head={head!r}" for head in TRAINED_HEADS)
        raise ValueError(
            f"teacher_training has no effect with teacher_head={config.networks.teacher_head!r}: "
            f"pass {choices}"
        )
    check_keywords(own, ALLOWED_FIELDS, "teacher_training")
    head_only = "linear-probe" in heads
    if head_only and own.get("freeze") is not None:
        raise ValueError(
            "teacher_training: freeze has no effect, teacher_head='linear-probe' trains the head "
            "alone"
        )
    values = config.flat()
    same = {name: values[name] for name in SHARED_FIELDS}
    same |= {"layer_decay": None, "freeze": "backbone" if head_only else None}
    if own.get("optimizer", same["optimizer"]) != same["optimizer"]:
        same |= {"lr": None, "weight_decay": None}
    if {"epochs", "max_steps"} & own.keys():
        same |= {"epochs": None, "max_steps": None}
    found = same | own
    DistillConfig.from_keywords(**found)  # a wrong value is an error before anything is loaded
    return found


def describe_finetuning(config: DistillConfig) -> str:
    """How teachers are fine-tuned, in a line for the plan.

    Args:
        config: The configuration of the run.

    Returns:
        Length, batch size, optimizer and learning rate; `layer_decay` where it is set.

    Raises:
        ValueError: If `teacher_training` is not allowed as it is.
    """
    s = DistillConfig.from_keywords(**finetuning_fields(config)).trainer
    length = f"{s.max_steps} steps" if s.max_steps else f"{s.epochs} epochs"
    decay = f", layer_decay {s.layer_decay:g}" if s.layer_decay is not None else ""
    optimizer = f"{s.optimizer}, lr {s.lr:g}{decay}"
    return f"fine-tuning of a teacher: {length}, batch_size {s.batch_size}, {optimizer}"


def finetune_teachers(
    config: DistillConfig,
    parts: RunParts,
    info: DataInfo,
    accelerator: Accelerator,
    train: TrainFunction,
) -> tuple[list[nn.Module], dict[str, Any], list[str]]:
    """Fine-tune the teachers that need it, or find them in their folders.

    Args:
        config: The configuration of the run.
        parts: Its networks; their hooks are taken off.
        info: The data.
        accelerator: Of the run.
        train: Runs a configuration.

    Returns:
        All teachers, the numbers of those that were fine-tuned, and lines for the plan.
    """
    parts.release()
    nets: list[nn.Module] = [teacher.model for teacher in parts.teachers]
    heads = check_head_names(config.networks)
    numbers: dict[str, Any] = {}
    notes: list[str] = []
    for number in parts.to_finetune:
        name = "teacher" if number == 0 else f"teacher/{number}"
        head = heads[number]
        assert head is not None
        nets[number].float()  # what is trained is float32
        row = _finetune(nets[number], head, config, info, name, accelerator, train)
        numbers |= {f"{name}_finetuned_{key}": value for key, value in row.items()}
        score = "not evaluated"
        if row.get("top1") is not None:
            score = f"top1 {row['top1']:.2f} on {row['split']}"
        where = f"kept in {row['folder'] or 'memory'}"
        if row["reused"]:
            where = f"found in {row['folder']}"
        notes.append(f"{name}: fine-tuned ({head}), {score}, {where}")
    return nets, numbers, notes


def _finetune(
    net: nn.Module,
    head: str,
    config: DistillConfig,
    info: DataInfo,
    name: str,
    accelerator: Accelerator,
    train: TrainFunction,
) -> dict[str, Any]:
    """Give `net` its fine-tuned weights, from its folder or by training; its numbers."""
    own_networks = replace(config.networks, teacher_head=head, teacher=net)
    precision = config.loop.mixed_precision or accelerator.mixed_precision
    config = replace(config, networks=own_networks).updated(mixed_precision=precision)
    options = finetuning_fields(config)
    folder = finetuned_folder(net, config, info)
    if _is_done(folder):
        assert folder is not None
        return _load_finetuned(net, folder) | {"folder": str(folder), "reused": True}
    _unfreeze(net, classifier_names(untapped(net, info.image_size)))
    training = DistillConfig.from_keywords(
        student=net, train_data=info.data, method="none", output_dir=folder, label=f"{name} {head}",
        figures=config.output.figures, **options,
    )  # fmt: skip
    try:
        result = _train_teacher(net, training, train)
    except OutputDirInUse as error:
        assert folder is not None
        _wait_for_other_run(folder, error)
        return _finetune(net, head, config, info, name, accelerator, train)
    row = {key: result.metrics.get(key) for key in RESULT_KEYS}
    if folder is not None and accelerator.is_main_process:
        write_json(folder / RESULT_FILE, row | {"teacher_head": head, "training": options})
        record_files(folder, [RESULT_FILE])
    accelerator.wait_for_everyone()
    return row | {"folder": str(folder) if folder else None, "reused": False}


def _is_done(folder: Path | None) -> bool:
    """Whether the folder holds a fine-tuned teacher, as rank 0 sees it before it writes."""
    if folder is None:
        return False
    return distributed.from_main((folder / RESULT_FILE).exists)


def _train_teacher(net: nn.Module, training: DistillConfig, train: TrainFunction) -> DistillResult:
    """Fine-tune a teacher, going on where an earlier run stopped."""
    has_folder = training.output.output_dir is not None
    first_weights = copy.deepcopy(net.state_dict())
    try:
        return train(training.updated(resume="auto" if has_folder else False))
    except (CheckpointError, SafetensorError, OutputDirNotEmpty) as error:
        logger.warning("%s; the teacher is fine-tuned again from the start", error)
        net.load_state_dict(first_weights)
        return train(training.updated(overwrite=True))


def _wait_for_other_run(folder: Path, error: OutputDirInUse) -> None:
    """Wait while another run fine-tunes the same teacher; all ranks call it."""
    logger.warning("%s. Waiting for it: it fine-tunes the teacher that this run needs", error)
    while distributed.from_main(lambda: is_in_use(folder)):
        time.sleep(WAIT_SECONDS)


def _unfreeze(net: nn.Module, head: Sequence[str]) -> None:
    """A frozen teacher is trained whole; of others, what is frozen stays so, except the head."""

    def in_head(name: str) -> bool:
        return name.rpartition(".")[0] in head

    everything = not any(p.requires_grad for n, p in net.named_parameters() if not in_head(n))
    for name, p in net.named_parameters():
        if everything or in_head(name):
            p.requires_grad_(True)


def finetuned_folder(net: nn.Module, config: DistillConfig, info: DataInfo) -> Path | None:
    """The folder of a fine-tuned teacher.

    Args:
        net: The teacher before it is fine-tuned.
        config: The configuration; `teacher_head` is that of this teacher.
        info: The data.

    Returns:
        A folder in `teacher_dir`, by default in output_dir/finetuned; None where nothing is
        written.

    Raises:
        ValueError: If `teacher_dir` is a file.
    """
    root = config.networks.teacher_dir
    if root is None and config.output.output_dir is not None:
        root = Path(config.output.output_dir) / "finetuned"
    if root is None:
        return None
    root = Path(root).expanduser()
    if root.is_file():
        raise ValueError(f"teacher_dir {root} is a file: give a folder")
    spec = {key: value for key, value in describe_model(net).items() if key != "source"}
    weights = fingerprint.of_network(net)
    fields = finetuning_fields(config)
    training = {key: value for key, value in fields.items() if key not in WITHOUT_EFFECT}
    data = fingerprint.of_data(info.loaded)
    key = fingerprint.of_plain([spec, weights, config.networks.teacher_head, training, data])
    return root / f"{spec['architecture'] or type(net).__name__}-{key}"


def _load_finetuned(net: nn.Module, folder: Path) -> dict[str, Any]:
    try:
        net.load_state_dict(load_file(folder / "student" / "model.safetensors"))
        row: Mapping[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except Exception as error:  # a missing or damaged file, each in the words of its library
        raise ValueError(
            f"the fine-tuned teacher in {folder} cannot be loaded ({type(error).__name__}: "
            f"{error}): delete the "
            "folder, it is made again"
        ) from error
    return {key: row.get(key) for key in RESULT_KEYS}
