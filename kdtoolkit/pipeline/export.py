"""After training: weights of the chosen epoch, student/ first, then metrics, cost and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.features.hooks import remove_tap_hooks
from kdtoolkit.features.model_inputs import input_shape
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.saving import save_model
from kdtoolkit.pipeline.build import RunParts
from kdtoolkit.pipeline.data_info import DataInfo
from kdtoolkit.pipeline.export_config import configure, data_config
from kdtoolkit.trainer.best_epoch import replace_lost_best
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.utils import checkpoint_store, distributed
from kdtoolkit.utils.checkpoint import CheckpointError, read_metadata

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """The network that a run exports.

    Attributes:
        networks: Every network of the run by name.
        name: The name of the exported one.
        reason: Why it is this one.
    """

    networks: dict[str, nn.Module]
    name: str
    reason: str


def load_chosen_epoch(run: Trainer) -> dict[str, Any]:
    """Load the best epoch's weights into the method, where a validation split chose one.

    Where they are lost, the weights of the last epoch stay, and a warning says so. All ranks call
    it.

    Args:
        run: The finished run.

    Returns:
        "epoch", "chosen" ("best" or "last") and "chosen_on".
    """
    if run.config.monitor is None or not run.best:
        return {"epoch": run.clock.epoch, "chosen": "last"}
    try:
        kept = _best_weights(run)
    except CheckpointError as error:
        kept = None
        logger.warning("%s", _describe_lost_best(run, error))
    is_lost = any(distributed.gather_objects(kept is None))
    if kept is None or is_lost:
        is_last = run.best["step"] == run.clock.step  # these are the best epoch's weights
        if not is_last:
            replace_lost_best(run)
            return {"epoch": run.clock.epoch, "chosen": "last"}
    else:
        _load_weights(run, *kept)
    return {"epoch": int(run.best["epoch"]), "chosen": "best", "chosen_on": run.config.monitor}


def _best_weights(run: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of the method and of callbacks at the best epoch."""
    if run.output_dir is None:
        kept = next(c.best_weights for c in run.callbacks if isinstance(c, Checkpoints))
        assert kept is not None
        return kept
    best = run.output_dir / "checkpoints" / "best"
    weights, states = checkpoint_store.read_method(best)
    own = run.method.state_dict()
    fits = weights.keys() == own.keys() and all(
        getattr(weights[key], "shape", None) == getattr(value, "shape", None)
        for key, value in own.items()
    )
    if read_metadata(best).get("step") != run.best["step"] or not fits:
        raise CheckpointError(f"{best} is of another epoch or another run")
    return weights, states


def _load_weights(run: Trainer, weights: dict[str, Any], states: dict[str, Any]) -> None:
    run.method.load_state_dict(weights)
    for callback in run.callbacks:
        if callback.networks():
            callback.load_state_dict(states[callback.name])


def _describe_lost_best(run: Trainer, error: CheckpointError) -> str:
    best = f"the best epoch ({run.best['epoch']}, top1 {run.best['top1']:.2f})"
    reason = str(error).partition("; ")[0]
    if run.best["step"] == run.clock.step:
        return f"{reason}. The student has the weights of {best}: it was the last one"
    return (
        f"{reason}. The student has the weights of the last epoch ({run.clock.epoch}), not those "
        f"of {best}"
    )


def choose_export(run: Trainer) -> Export:
    """Choose the network that is exported.

    Args:
        run: The finished run.

    Returns:
        All networks, and the exported one with the reason.
    """
    networks = _all_networks(run)
    names, why = run.export_candidates()
    if len(names) < 2:
        return Export(networks, names[0], why)
    among = f"of {', '.join(names)} ({why})"
    if run.config.monitor is not None and run.best:
        reason = f"it is the best on the {run.config.monitor} split {among}"
        return Export(networks, run.best["network"], reason)
    reason = f"it is the first {among}; without a validation split none is chosen"
    return Export(networks, names[0], reason)


def _all_networks(run: Trainer) -> dict[str, nn.Module]:
    """The method's networks, then those that callbacks keep."""
    run.sync()
    nets = dict(run.method.networks())
    for callback in run.callbacks:
        nets |= {name: net.requires_grad_(True) for name, net in callback.networks().items()}
    return nets


def save_networks(run: Trainer, export: Export, info: DataInfo, *, every: bool) -> None:
    """Save student/; its configuration says what images it was evaluated with.

    Args:
        run: The finished run; without a folder nothing is saved.
        export: All networks, and the exported one.
        info: The data.
        every: Whether the other networks are saved too, in networks/.
    """
    if run.output_dir is not None and run.accelerator.is_main_process:
        folders = {export.name: run.output_dir / "student"}
        if every:
            others = [name for name in export.networks if name != export.name]
            root = run.output_dir / "networks"
            folders |= {name: root / name.replace("/", "-") for name in others}
        for name, folder in folders.items():
            net = export.networks[name]
            save_model(
                net, folder, data_config=data_config(net, info),
                label_names=info.loaded.class_names,
            )  # fmt: skip
    for net in export.networks.values():
        configure(net, info)
    run.accelerator.wait_for_everyone()


def measure(
    run: Trainer, parts: RunParts, info: DataInfo, chosen: dict[str, Any], export: Export
) -> dict[str, Any]:
    """The final metrics. Every rank calls it.

    It takes the hooks off, for costs are those of the bare networks.

    Args:
        run: The finished run.
        parts: Networks and method; the student is the exported network.
        info: The data.
        chosen: Which epoch the weights are of.
        export: The exported network.

    Returns:
        The metrics of the result.
    """
    split = info.loaded.test or info.loaded.val
    rows = run.evaluator.evaluate_networks(split) if split is not None else {export.name: {}}
    final: dict[str, Any] = {**rows[export.name]}
    final |= {"exported": export.name, "exported_reason": export.reason}
    if len(rows) > 1:
        final["networks"] = {network: row["top1"] for network, row in rows.items()}
    final |= {"split": split.name if split else None} | chosen | parts.extra_metrics
    teacher = run.teacher_metrics.get(f"teacher/{split.name}") if split is not None else None
    if teacher:
        final |= {f"teacher_{key}": value for key, value in teacher.items()}
        known = teacher["top1"]
        final["retention"] = final["top1"] / known if known else float("nan")
    parts.release()
    costs = attempt("the cost could not be measured", lambda: _costs(run, parts, info, final))
    final |= costs or {}
    run.metrics_log.add(event="final", step=run.clock.step, **final)
    return final


def _costs(run: Trainer, parts: RunParts, info: DataInfo, final: dict[str, Any]) -> dict[str, Any]:
    """Each network is measured with images of the size that it gets in training."""
    from kdtoolkit import metrics

    device, nets = run.accelerator.device, {"student": parts.student}
    if "teacher_top1" in final:
        nets["teacher"] = parts.teachers[0].model
    sizes = {
        name: (
            input_shape(net)[0],
            *(Preprocess.from_model(net, info.image_size).size or info.image_size),
        )
        for name, net in nets.items()
    }
    if "teacher" in nets:
        return metrics.measure_compression(
            nets["teacher"], parts.student, sizes, device=device,
            teacher_top1=final["teacher_top1"], student_top1=final["top1"],
            num_classes=info.num_classes,
        )  # fmt: skip
    cost = metrics.measure_cost(parts.student, sizes["student"], device=device)
    return {"params": cost.params, "macs": cost.macs, "latency_ms": cost.latency_ms}


def write_report(
    folder: Path, parts: RunParts, baseline: Path | None, info: DataInfo, figures: bool = True
) -> None:
    """Write report.md and its figures; a failure is logged and loses nothing.

    Args:
        folder: Folder of the run.
        parts: Networks, without hooks.
        baseline: Folder of the run of the student alone.
        info: The data.
        figures: Whether it has figures.
    """
    attempt(
        "report.md could not be written", lambda: _report(folder, parts, baseline, info, figures)
    )


def _report(
    folder: Path, parts: RunParts, baseline: Path | None, info: DataInfo, figures: bool
) -> None:
    from kdtoolkit import report
    from kdtoolkit.pipeline.report_images import choose_images

    data = info.loaded
    split = data.test or data.val
    chosen = None
    if split is not None and figures:
        chosen = attempt(
            "images for Grad-CAM could not be read",
            lambda: choose_images(data, split, parts.student),
        )
    report.write(
        folder,
        student=parts.student,
        teacher=parts.teachers[0].model if parts.teachers else None,
        baseline=baseline,
        images=None if chosen is None else chosen.images,
        labels=None if chosen is None else chosen.labels,
        images_note="" if chosen is None else chosen.note,
        class_names=data.class_names,
        figures=figures,
    )


def bare(net: nn.Module) -> nn.Module:
    """The network on the CPU, contiguous, in eval mode, without hooks.

    Args:
        net: The network; it is changed in place. Only the hooks of taps are removed.

    Returns:
        The same network.
    """
    return remove_tap_hooks(net).cpu().to(memory_format=torch.contiguous_format).eval()


def attempt(what: str, action: Callable[[], T]) -> T | None:
    """Do what may fail without a loss: the student is saved already.

    Args:
        what: What is said if it fails.
        action: What is done.

    Returns:
        What the action returns; None if it fails, and the cause is logged.
    """
    try:
        return action()
    except Exception as error:
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
        return None
