"""distill(): from names and numbers to a student."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn

from . import checkpoint, models
from . import data as data_room
from . import metrics as numbers
from . import report as report_room
from .callbacks import Callback, Checkpoints, ProgressLog, Trackers
from .callbacks.trackers import choose
from .engine import Run, Settings
from .files import recover, write_json, write_yaml
from .journal import Row, environment
from .method import Method
from .methods import create_method, default_losses
from .methods.create import check_losses, check_options, needs_teacher
from .plan import Plan
from .preprocess import Preprocess
from .registry import nearest
from .taps import Frozen, Taps
from .types import Weight

HEADS = ("finetune", "linear-probe", "feature-only", "as-is")


@dataclass
class DistillResult:
    """What a run leaves.

    student     the network, bare: eval mode, no hooks, no adapters
    metrics     top1, top5, loss, ece, teacher_top1, agreement, retention = top1 / teacher_top1, cost and compression of the
                chosen epoch; accuracies in percent; "split", "epoch" and "chosen" ("last" or "best") say which numbers they are
    history     the rows of metrics.jsonl
    plan        taps, shapes, adapters, losses, weights, parameter counts; printable
    output_dir  the folder, or None
    """

    student: nn.Module
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
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
    losses: Mapping[str, Weight] | None = None,
    temperature: float = 4.0,
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
    teacher_head: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] = False,
    overwrite: bool = False,
    report_to: str | list[str] | None = "auto",
    mixed_precision: str | None = None,
    grad_accum: int = 1,
    compile: bool = False,
    channels_last: bool | str = "auto",
    grad_clip: float | None = None,
    seed: int = 0,
    num_workers: int | str = "auto",
    accelerator: Accelerator | None = None,
    dry_run: bool = False,
    progress: str | bool = "auto",
    validation: Any = "auto",
    data_path: str | os.PathLike[str] | None = None,
    train_limit: int | None = None,
    image_size: int | None = None,
    momentum: float = 0.9,
    milestones: Sequence[float] = (0.5, 2 / 3, 5 / 6),
    log_every: int = 50,
    eval_every: int = 1,
    eval_test: str = "auto",
    student_args: Mapping[str, Any] | None = None,
    teacher_args: Mapping[str, Any] | None = None,
    baseline: Any = None,
    label: str = "",
    **method_options: Any,
) -> DistillResult:
    """Train `student` from `teacher` on `train_data`; returns the student, its numbers and its folder.

    teacher      nn.Module, timm name, "local-dir:PATH", "hf-hub:ID", PATH.safetensors, a list of these, or None
    student      the same, without the list; a name without a weight tag starts from random weights
    train_data   HF Dataset, DatasetDict or IterableDataset, torch Dataset, DataLoader, preset ("cifar100", "digits"), Hub name,
                 folder of parquet or of images. Images stay in [0, 1]: each model normalises its own input
    eval_data    the test set; default the data's own test split
    method       a name of list_methods(), several names, Objectives, or a Method; "none" is plain training (teacher=None)
    layers       "auto" or [(student tap, teacher tap), ...], taps being stage numbers (from 1) or module names
    losses       {loss: weight}, the whole sum; a weight may be a schedule; default the method's own
    temperature  of KD, no unit
    epochs       passes over the training data (default 30), or max_steps optimizer steps
    batch_size   images per optimizer step, over all processes and accumulation steps
    optimizer    "sgd" (plain momentum, decay on all parameters), "nesterov", or a name of timm; lr defaults to 0.05 for these
                 two and 1e-3 for others, weight_decay to 5e-4 and 0.05
    scheduler    "cosine", "multistep" (at `milestones`, shares of the run), "onecycle", "linear", "constant"
    validation   "auto" (the data's own split, else 10 % of the training rows, at most 5,000), a share, a number of rows,
                 "none" (the last epoch is taken), or "test" (the best epoch is chosen on the test set: say so when you report)
    teacher_head what to do with a teacher of other classes than the data: "feature-only" uses its features and not its logits;
                 "as-is" insists that the classes are the same
    resume       "auto" goes on where output_dir stopped, if it holds a run; True insists; or a checkpoint's folder
    baseline     a finished plain run of the same student (DistillResult or folder) that the report shows beside this one, or
                 True to train it first, in output_dir/baseline
    dry_run      stop after the plan: no weights, no data
    method_options  options of the losses, e.g. reset=, detach=, hint=, p=; an unknown one is an error

    Raises ValueError for anything that cannot work, before training; NonFiniteLoss and Interrupted during it, after the last
    good checkpoint was kept.
    """
    if temperature is not None and "temperature" not in method_options:
        method_options["temperature"] = temperature
    is_method = isinstance(method, Method)
    chosen = {} if is_method else dict(losses) if losses is not None else default_losses(method)
    _check_names(method, chosen, teacher, method_options, teacher_head, is_method)
    settings = _settings(
        epochs, max_steps, batch_size, optimizer, lr, weight_decay, momentum, scheduler, tuple(milestones), warmup_epochs,
        grad_accum, grad_clip, compile, seed, log_every, eval_every, eval_test,
    )  # fmt: skip
    trackers = [] if dry_run else choose(report_to)
    folder = Path(output_dir) if output_dir is not None else None
    config = _config(locals(), chosen)
    resume_from = None if dry_run else _claim(folder, resume, overwrite)
    accelerator = accelerator or _accelerator(mixed_precision, settings, trackers, folder)
    set_seed(seed)
    facts = _Facts.of(
        train_data, eval_data, dry_run, seed=seed, validation=validation, transforms=transforms, num_classes=num_classes,
        num_workers=num_workers, image_size=image_size, data_path=data_path, train_limit=train_limit,
    )  # fmt: skip
    device = torch.device("meta" if dry_run else "cpu")
    with device:
        net = _student(student, facts, dry_run, dict(student_args or {}))
        teachers = _teachers(teacher, facts, dry_run, dict(teacher_args or {}), teacher_head, chosen)
        if is_method:
            built = method
        else:
            pre = Preprocess.of(net, facts.image)
            taps = Taps(net, None, pre.size or facts.image)
            options = {k: v for k, v in method_options.items() if k != "temperature" or "kd" in chosen}
            built = create_method(
                method, taps, teachers, losses=chosen, layers=layers, preprocess=pre, image=facts.image, **options
            )
    plan = _plan(built, net, teachers, facts, settings)
    if dry_run:
        built.release()
        return DistillResult(net, plan=plan, output_dir=folder)
    try:
        alone = _baseline(baseline, locals())
        settings = _placed(settings, channels_last, net, facts)
        if accelerator.is_main_process and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_yaml(folder / "config.yaml", config)
            write_json(folder / "env.json", environment(accelerator))
            write_json(folder / "plan.json", plan)
        accelerator.wait_for_everyone()
        card = {
            "method": method if isinstance(method, str) else repr(method),
            "losses": {k: str(v) for k, v in chosen.items()},
        }
        card["networks"] = {"student": str(config["student"])}
        watchers = [Checkpoints(), ProgressLog(_mode(progress), label=label)]
        if trackers:
            watchers.append(Trackers(config))
        run = Run(built, facts.data, settings, accelerator, [*callbacks, *watchers], folder, card)
        if resume_from is not None:
            run.resume(resume_from)
        run.fit()
        final = _finish(run, net, teachers, facts)
    finally:
        built.release()
        accelerator.free_memory()
    result = DistillResult(net.cpu().eval(), final, run.journal.rows, plan, folder)
    if folder is not None and accelerator.is_main_process:
        net.to(memory_format=torch.contiguous_format)
        models.save(net, folder / "student")
        _report(result, teachers, alone, facts)
    accelerator.wait_for_everyone()
    return result


# -------------------------------------------------------------------------------------------------------------- checks
def _check_names(
    method: Any, losses: Mapping[str, Weight], teacher: Any, options: dict[str, Any], head: str | None, is_method: bool
) -> None:
    if head is not None and head not in HEADS:
        raise ValueError(f"teacher_head={head!r}; allowed: {', '.join(map(repr, HEADS))}")
    if is_method:
        return
    given = [] if isinstance(method, str) else [m for m in method if isinstance(m, nn.Module)]
    check_losses(losses, given)
    known = [p for p in inspect.signature(distill).parameters if p != "method_options"]
    rest = {k: v for k, v in options.items() if k != "temperature"}
    for option in rest:
        hint = nearest(option, known, 1)
        if hint:
            raise ValueError(f"unknown argument {option!r}{hint}")
    check_options(losses, rest)
    wanting = needs_teacher(losses, given)
    if wanting and teacher is None:
        raise ValueError(
            f"method {method!r} needs a teacher for {', '.join(map(repr, wanting))} and teacher=None: pass a model, "
            "or method='none' for plain training"
        )
    if not wanting and teacher is not None:
        raise ValueError(f"method {method!r} uses no teacher: pass teacher=None, or another method")


def _settings(
    epochs: int | None, max_steps: int | None, batch_size: int, optimizer: str, lr: float | None, weight_decay: float | None,
    momentum: float, scheduler: str, milestones: tuple[float, ...], warmup_epochs: float, grad_accum: int,
    grad_clip: float | None, compile: bool, seed: int, log_every: int, eval_every: int, eval_test: str,
) -> Settings:  # fmt: skip
    if epochs is not None and max_steps is not None:
        raise ValueError(f"epochs={epochs} and max_steps={max_steps}: give one of them")
    for name, number in (
        ("batch_size", batch_size),
        ("grad_accum", grad_accum),
        ("log_every", log_every),
        ("eval_every", eval_every),
    ):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number!r}, it must be a whole number from 1")
    papers = optimizer in ("sgd", "nesterov", "momentum")
    return Settings(
        epochs=30 if epochs is None and max_steps is None else epochs, max_steps=max_steps, batch_size=batch_size,
        optimizer=optimizer, lr=(0.05 if papers else 1e-3) if lr is None else lr,
        weight_decay=(5e-4 if papers else 0.05) if weight_decay is None else weight_decay, momentum=momentum,
        scheduler=scheduler, milestones=milestones, warmup_epochs=warmup_epochs, grad_accum=grad_accum, grad_clip=grad_clip,
        compile=compile, seed=seed, log_every=log_every, eval_every=eval_every, eval_test=eval_test,
    )  # fmt: skip


def _claim(folder: Path | None, resume: Any, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, if any; makes room in the folder, or refuses it."""
    if folder is None:
        if resume:
            raise ValueError(f"resume={resume!r} needs output_dir, the folder of the run to go on with")
        return None
    if isinstance(resume, (str, os.PathLike)) and resume != "auto":
        if not Path(resume).is_dir():
            raise ValueError(
                f"resume={str(resume)!r} is no folder: give a checkpoint such as {folder}/checkpoints/last, or 'auto'"
            )
        return Path(resume)
    last = folder / "checkpoints" / "last"
    recover(last)
    if resume and last.exists():
        return last
    if resume is True:
        raise ValueError(f"resume=True, but {last} does not exist; resume='auto' starts anew where there is none")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: give a folder")
    if folder.exists() and any(p.name not in ("baseline", "teacher") for p in folder.iterdir()):
        if not overwrite and not (resume == "auto" and not (folder / "checkpoints").exists()):
            holds = (
                f"checkpoints/last ({checkpoint.where(checkpoint.read_card(last))})" if last.exists() else "other files"
            )
            raise ValueError(f"{folder} holds {holds}: pass resume='auto' or overwrite=True, or another output_dir")
        for name in ("checkpoints", "student", "figures", "baseline"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("config.yaml", "env.json", "plan.json", "metrics.jsonl", "summary.csv", "report.md"):
            (folder / name).unlink(missing_ok=True)
    return None


# ------------------------------------------------------------------------------------------------------------ building
@dataclass
class _Facts:
    """What the models need to know of the data; the data itself is not read in a dry run."""

    classes: int
    image: tuple[int, int]
    data: Any
    describe: dict[str, Any]

    @classmethod
    def of(cls, train_data: Any, eval_data: Any, dry_run: bool, **options: Any) -> _Facts:
        preset = data_room.PRESETS.get(train_data) if isinstance(train_data, str) else None
        if dry_run and preset is not None and options["image_size"] is None:
            classes = options["num_classes"] or preset.num_classes
            return cls(
                classes, preset.size, None, {"name": train_data, "num_classes": classes, "image_size": preset.size}
            )
        loaded = data_room.load(train_data, eval_data, **options)
        return cls(loaded.num_classes, loaded.image_size, loaded, loaded.describe())


def _student(spec: Any, facts: _Facts, dry_run: bool, args: dict[str, Any]) -> nn.Module:
    if spec is None:
        raise ValueError("student=None: pass a model or a timm name, it is what is trained")
    net = models.build(spec, num_classes=facts.classes, role="student", pretrained=False if dry_run else None, **args)
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("every parameter of the student is frozen (requires_grad=False): nothing can be trained")
    _same_classes(net, facts, "student")
    return net


def _teachers(
    spec: Any, facts: _Facts, dry_run: bool, args: dict[str, Any], head: str | None, losses: Mapping[str, Weight]
) -> list[Frozen]:
    specs = [] if spec is None else list(spec) if isinstance(spec, (list, tuple)) else [spec]
    teachers = []
    for one in specs:
        named = isinstance(one, str) and not one.endswith(".safetensors") and ":" not in one and not Path(one).exists()
        classes = {"num_classes": facts.classes} if dry_run and named and "." not in one else {}
        net = models.build(
            one, role="teacher", pretrained=False if dry_run else True if named else None, **classes, **args
        )
        pre = Preprocess.of(net, facts.image)
        teacher = Frozen(net, None, pre.size or facts.image, preprocess=pre)
        outputs = _outputs(teacher)
        if outputs != facts.classes:
            if head == "feature-only" and not {"kd", "logits"} & set(losses):
                teacher.scored = False
            else:
                raise ValueError(
                    f"the teacher has {outputs} classes, the data {facts.classes}: pass "
                    + " | ".join(f'teacher_head="{h}"' for h in HEADS)
                    + ' ("feature-only" goes with losses on features: fitnet, at, sp; "finetune" and "linear-probe" are done '
                    "before: distill(None, teacher, data, method='none'))"
                )
        teachers.append(teacher)
    return teachers


def _outputs(taps: Taps) -> int:
    """Number of classes, from the shape of the logits."""
    known = getattr(taps.model, "num_classes", None)
    if isinstance(known, int):
        return known
    logits = taps.trace.logits
    if not taps.trace.bare_logits or len(logits) != 1 or logits[0].dim() != 2:
        raise ValueError(
            f"{type(taps.model).__name__} returns {[tuple(t.shape) for t in logits]}: logits must be one tensor (B, classes)"
        )
    return int(logits[0].shape[1])


def _same_classes(net: nn.Module, facts: _Facts, role: str) -> None:
    outputs = _outputs(Taps(net, None, facts.image))
    if outputs != facts.classes:
        raise ValueError(
            f"the {role} has {outputs} classes, the data {facts.classes}: build it with num_classes={facts.classes}"
        )


def _accelerator(precision: str | None, s: Settings, trackers: list[str], folder: Path | None) -> Accelerator:
    """accelerate keeps one state per process: a second run with another precision starts from a fresh one."""
    AcceleratorState._reset_state()
    loading = DataLoaderConfiguration(
        split_batches=True, use_seedable_sampler=True, data_seed=s.seed, non_blocking=True
    )
    return Accelerator(
        mixed_precision=precision,  # type: ignore[arg-type]
        gradient_accumulation_steps=s.grad_accum,
        dataloader_config=loading,
        log_with=trackers or None,  # type: ignore[arg-type]
        project_dir=str(folder / "trackers") if folder else None,
    )


def _placed(s: Settings, channels_last: bool | str, net: nn.Module, facts: _Facts) -> Settings:
    """Settings that depend on the models and the data."""
    from dataclasses import replace

    convolutional = any(isinstance(m, nn.Conv2d) for m in net.modules())
    last = convolutional if channels_last == "auto" else bool(channels_last)
    return replace(s, channels_last=last, monitor="val" if facts.data.val is not None else None)


def _mode(progress: str | bool) -> str:
    return {True: "auto", False: "off"}.get(progress, progress) if isinstance(progress, bool) else progress


def _plan(method: Method, net: nn.Module, teachers: list[Frozen], facts: _Facts, s: Settings) -> Plan:
    plan = Plan(method.plan())
    named = {"student": getattr(net, "pretrained_cfg", {}).get("architecture") or type(net).__name__}
    for i, teacher in enumerate(teachers):
        cfg = getattr(teacher.model, "pretrained_cfg", {})
        named["teacher" if len(teachers) == 1 else f"teacher/{i}"] = (
            cfg.get("architecture") or type(teacher.model).__name__
        )
    length = f"{s.max_steps} steps" if s.max_steps else f"{s.epochs} epochs"
    plan |= {"models": named, "data": facts.describe}
    plan["schedule"] = {
        "length": length, "batch_size": s.batch_size, "optimizer": s.optimizer, "lr": s.lr, "weight_decay": s.weight_decay,
        "scheduler": s.scheduler,
    }  # fmt: skip
    return plan


def _config(given: dict[str, Any], losses: Mapping[str, Weight]) -> dict[str, Any]:
    """Every argument of distill() as it was resolved, for config.yaml."""
    names = [n for n in inspect.signature(distill).parameters if n != "method_options"]
    config = {
        n: _told(given[n]) for n in names if n not in ("accelerator", "dry_run", "callbacks", "resume", "overwrite")
    }
    config |= {k: getattr(given["settings"], k) for k in ("epochs", "max_steps", "lr", "weight_decay")}
    config["losses"] = {k: v if isinstance(v, (int, float)) else repr(v) for k, v in losses.items()}
    config["callbacks"] = [type(c).__name__ for c in given["callbacks"]]
    return config | {k: _told(v) for k, v in given["method_options"].items()}


def _told(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_told(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _told(v) for k, v in value.items()}
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _baseline(baseline: Any, given: dict[str, Any]) -> Path | None:
    """The folder of the same student trained alone."""
    if baseline is None or baseline is False:
        return None
    if baseline is not True:
        return Path(baseline.output_dir if isinstance(baseline, DistillResult) else baseline)
    if given["folder"] is None or not isinstance(given["student"], str):
        raise ValueError(
            "baseline=True trains the student alone first: it needs output_dir and a student given by name"
        )
    same = {n: given[n] for n in inspect.signature(distill).parameters if n in given and n not in _NOT_SHARED}
    folder = given["folder"] / "baseline"
    distill(
        None, method="none", train_data=given["facts"].data, output_dir=folder, resume="auto", label="alone", **same
    )
    return folder


_NOT_SHARED = {
    "teacher", "teacher_args", "teacher_head", "method", "losses", "layers", "train_data", "eval_data", "output_dir", "resume",
    "overwrite", "accelerator", "dry_run", "baseline", "callbacks", "label", "method_options", "temperature",
    "validation", "transforms", "num_classes", "data_path", "train_limit", "image_size", "num_workers",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- finishing
def _finish(run: Run, net: nn.Module, teachers: list[Frozen], facts: _Facts) -> dict[str, Any]:
    """Numbers of the chosen epoch, with that epoch's weights in the student."""
    chosen, epoch = "last", run.clock.epoch
    if run.settings.monitor is not None and run.best:
        chosen, epoch = "best", int(run.best["epoch"])
        kept = next((c.best_weights for c in run.callbacks if isinstance(c, Checkpoints)), None)
        if run.output_dir is not None:
            checkpoint.load_weights(run.method, run.output_dir / "checkpoints" / "best")
        elif kept is not None:
            run.method.load_state_dict(kept)
    split = facts.data.test or facts.data.val
    final: dict[str, Any] = run.evaluate(split, "student") if split is not None else {}
    final |= {"split": split.name if split else None, "epoch": epoch, "chosen": chosen}
    if run.settings.monitor is not None:
        final["chosen_on"] = run.settings.monitor
    run.method.release()  # costs are those of the bare networks
    device, size = run.accelerator.device, (3, *facts.image)
    teacher = run.teacher_metrics.get(f"teacher/{split.name}") if split is not None else None
    if teacher:
        final |= {f"teacher_{k}": v for k, v in teacher.items()}
        final["retention"] = final["top1"] / teacher["top1"] if teacher["top1"] else float("nan")
        tops = {"teacher_top1": teacher["top1"], "student_top1": final["top1"], "num_classes": facts.classes}
        final |= numbers.summary(teachers[0].model, net, size, device=device, **tops)
    else:
        cost = numbers.cost(net, size, device=device)
        final |= {"params": cost.params, "macs": cost.macs, "latency_ms": cost.latency_ms}
    run.journal.add(event="final", step=run.clock.step, **final)
    return final


def _report(result: DistillResult, teachers: list[Frozen], alone: Path | None, facts: _Facts) -> None:
    split = facts.data.test or facts.data.val
    images = labels = None
    if split is not None:
        batch = facts.data.finish(next(iter(split.loader(8))), epoch=0, train=False)
        images, labels = batch["x"], batch["y"]
    assert result.output_dir is not None
    report_room.write(
        result.output_dir,
        student=result.student,
        teacher=teachers[0].model.cpu() if teachers else None,
        baseline=alone,
        images=images,
        labels=labels,
        class_names=facts.data.class_names,
    )
