"""Teachers of other classes: a new head is trained on the data once, and found again by every run that needs the same.

A fine-tuned teacher lies in a folder named after a digest of all it depends on: the network and its weights without the
old head, teacher_head, the data, the settings and the seed. The student, the method and places are no part of it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kdtoolkit import models
from kdtoolkit.core.config import SHARED, TrainerConfig
from kdtoolkit.models.head import classifier_names
from kdtoolkit.pipeline import fingerprint
from kdtoolkit.pipeline.networks import TRAINED, heads, plain
from kdtoolkit.utils.checkpoint import CheckpointError, OutputDirNotEmpty
from kdtoolkit.utils.io import write_json
from kdtoolkit.utils.registry import suggestion

ALLOWED = [*SHARED, "layer_decay", "freeze"]  # what teacher_training may say
SHOWN = ("report_to", "progress", "log_every", "eval_test")  # change nothing of the teacher
DONE = "finetuned.json"


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of distill() with which teachers are fine-tuned: those of this run, changed by teacher_training.

    freeze and layer_decay are not taken over, they are the student's. An optimizer of its own brings its own lr and
    weight_decay, a length of its own replaces the run's. ValueError for what is unknown or has no effect.
    """
    own = dict(given["teacher_training"] or {})
    asked = [head for head in heads(given) if head in TRAINED]
    if own and not asked:
        raise ValueError(
            f"teacher_training has no effect with teacher_head={given['teacher_head']!r}: pass "
            + " or ".join(f"teacher_head={head!r}" for head in TRAINED)
        )
    for name in own:
        if name not in ALLOWED:
            raise ValueError(
                f"teacher_training: unknown {name!r}{suggestion(name, ALLOWED) or '.'} Allowed: {', '.join(ALLOWED)}"
            )
    probe = "linear-probe" in asked
    if probe and own.get("freeze") is not None:
        raise ValueError(
            "teacher_training: freeze has no effect, teacher_head='linear-probe' trains the head alone"
        )
    same = {name: given[name] for name in SHARED} | {
        "layer_decay": None,
        "freeze": "backbone" if probe else None,
    }
    if own.get("optimizer", same["optimizer"]) != same["optimizer"]:
        same |= {"lr": None, "weight_decay": None}
    if {"epochs", "max_steps"} & own.keys():
        same |= {"epochs": None, "max_steps": None}
    found = same | own
    TrainerConfig.of({**given, **found})
    return found


def told(given: Mapping[str, Any]) -> str:
    """For the plan: how teachers are fine-tuned."""
    s = TrainerConfig.of({**given, **settings_of(given)})
    length = f"{s.max_steps} steps" if s.max_steps else f"{s.epochs} epochs"
    decay = f", layer_decay {s.layer_decay:g}" if s.layer_decay is not None else ""
    return f"fine-tuning of a teacher: {length}, batch_size {s.batch_size}, {s.optimizer}, lr {s.lr:g}{decay}"


def adapted(
    given: Mapping[str, Any],
    parts: Any,
    facts: Any,
    train: Callable[..., Any],
    accelerator: Accelerator,
) -> tuple[list[nn.Module], dict[str, Any], list[str]]:
    """The teachers, those with a new head trained on the data; their numbers, and lines for the plan.

    train  distill()
    """
    parts.release()
    nets: list[nn.Module] = [teacher.model for teacher in parts.teachers]
    numbers: dict[str, Any] = {}
    notes = []
    for number in parts.to_adapt:
        name, head = "teacher" if number == 0 else f"teacher/{number}", heads(given)[number]
        nets[number].float()  # what is trained is float32
        own = {**given, "teacher_head": head, "teacher": nets[number]}
        own["mixed_precision"] = given["mixed_precision"] or accelerator.mixed_precision
        row = _ready(nets[number], own, facts, name, train, accelerator)
        numbers |= {f"{name}_finetuned_{k}": v for k, v in row.items()}
        told = (
            f"top1 {row['top1']:.2f} on {row['split']}"
            if row.get("top1") is not None
            else "not evaluated"
        )
        where = (
            f"found in {row['folder']}" if row["reused"] else f"kept in {row['folder'] or 'memory'}"
        )
        notes.append(f"{name}: fine-tuned ({head}), {told}, {where}")
    return nets, numbers, notes


def _ready(
    net: nn.Module, given: Mapping[str, Any], facts: Any, name: str, train: Callable[..., Any],
    accelerator: Accelerator,
) -> dict[str, Any]:  # fmt: skip
    """Give `net` its fine-tuned weights, from its folder or by training; what is told of it."""
    options = settings_of(given)
    folder = place(net, given, facts)
    done = folder is not None and (folder / DONE).exists()
    accelerator.wait_for_everyone()  # every rank has looked before one writes
    if done:
        assert folder is not None
        return _found(net, folder) | {"folder": str(folder), "reused": True}
    _switch_on(net, classifier_names(plain(net, facts.image)))
    same = {
        "method": "none",
        "output_dir": folder,
        "label": f"{name} {given['teacher_head']}",
        **options,
    }
    start = copy.deepcopy(net.state_dict())
    try:
        result = train(None, net, facts.data, resume="auto" if folder else False, **same)
    except (
        CheckpointError,
        SafetensorError,
        OutputDirNotEmpty,
    ) as error:  # what is there is damaged: a cache is made anew
        print(f"kdtoolkit: {error}; the teacher is fine-tuned anew", file=sys.stderr)
        net.load_state_dict(start)
        result = train(None, net, facts.data, overwrite=True, **same)
    row = {k: result.metrics.get(k) for k in ("top1", "split", "epoch", "chosen")}
    if folder is not None and accelerator.is_main_process:
        write_json(
            folder / DONE, row | {"teacher_head": given["teacher_head"], "training": options}
        )
    accelerator.wait_for_everyone()
    return row | {"folder": str(folder) if folder else None, "reused": False}


def _switch_on(net: nn.Module, head: list[str]) -> None:
    """A teacher that came frozen is trained whole; of others what its owner froze stays so, but for the head."""
    everything = not any(
        p.requires_grad for n, p in net.named_parameters() if n.rpartition(".")[0] not in head
    )
    for name, p in net.named_parameters():
        if everything or name.rpartition(".")[0] in head:
            p.requires_grad_(True)


def place(net: nn.Module, given: Mapping[str, Any], facts: Any) -> Path | None:
    """The folder of this teacher in teacher_dir, by default in output_dir/finetuned; None where nothing is written."""
    root = given["teacher_dir"]
    if root is None and given["output_dir"] is not None:
        root = Path(given["output_dir"]) / "finetuned"
    if root is None:
        return None
    spec = {k: v for k, v in models.spec_of(net).items() if k != "source"}
    if Path(root).expanduser().is_file():
        raise ValueError(f"teacher_dir {root} is a file: give a folder")
    weights = fingerprint.of_network(net)
    training = {k: v for k, v in settings_of(given).items() if k not in SHOWN}
    key = fingerprint.of_plain(
        [spec, weights, given["teacher_head"], training, fingerprint.of_data(facts.data)]
    )
    return Path(root).expanduser() / f"{spec['architecture'] or type(net).__name__}-{key}"


def _found(net: nn.Module, folder: Path) -> dict[str, Any]:
    try:
        net.load_state_dict(load_file(folder / "student" / "model.safetensors"))
        row = dict(json.loads((folder / DONE).read_text(encoding="utf-8")))
    except Exception as error:  # a missing or damaged file, each in the words of its library
        raise ValueError(
            f"the fine-tuned teacher in {folder} cannot be loaded ({type(error).__name__}: {error}): delete the "
            "folder, it is made again"
        ) from error
    return {k: row.get(k) for k in ("top1", "split", "epoch", "chosen")}
