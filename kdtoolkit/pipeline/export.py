"""After training: the weights of the chosen epoch, student/ first, then numbers, cost and report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdtoolkit import metrics as numbers
from kdtoolkit import models
from kdtoolkit import report as report_room
from kdtoolkit.callbacks.checkpoints import Checkpoints
from kdtoolkit.features.hooks import strip
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.utils import checkpoint


def choose(run: Any) -> dict[str, Any]:
    """Put the best epoch's weights into the method, where a validation split chose one; which epoch it is."""
    if run.config.monitor is None or not run.best:
        return {"epoch": run.clock.epoch, "chosen": "last"}
    if run.output_dir is not None:
        best = run.output_dir / "checkpoints" / "best"
        checkpoint.load_weights(run.method, best)
        states = checkpoint.callback_states(best)
    else:
        kept = next(c.best_weights for c in run.callbacks if isinstance(c, Checkpoints))
        assert kept is not None
        weights, states = kept
        run.method.load_state_dict(weights)
    for callback in run.callbacks:
        if callback.networks():
            callback.load_state_dict(states[callback.name])
    return {"epoch": int(run.best["epoch"]), "chosen": "best", "chosen_on": run.config.monitor}


def product(run: Any) -> tuple[str, str]:
    """Name of the network that is handed over, and why this one."""
    names, why = run.export_candidates()
    if len(names) < 2:
        return names[0], why
    among = f"of {', '.join(names)} ({why})"
    if run.config.monitor is not None and run.best:
        return run.best["network"], f"it is the best on the {run.config.monitor} split {among}"
    return names[0], f"it is the first {among}; without a validation split none is chosen"


def networks(run: Any) -> dict[str, nn.Module]:
    """Every network of a run by name: the method's, then those that callbacks keep."""
    run.sync()
    nets = dict(run.method.networks())
    for callback in run.callbacks:
        nets |= {name: net.requires_grad_(True) for name, net in callback.networks().items()}
    return nets


def keep(run: Any, nets: dict[str, nn.Module], name: str, facts: Any, every: bool) -> None:
    """student/, whatever else may fail afterwards; with `every` the others in networks/. The configuration of each says
    the image size that it was trained on."""
    if run.output_dir is not None and run.accelerator.is_main_process:
        folders = {name: run.output_dir / "student"}
        if every:
            folders |= {
                n: run.output_dir / "networks" / n.replace("/", "-") for n in nets if n != name
            }
        for network, folder in folders.items():
            size = Preprocess.of(nets[network], facts.image).size or facts.image
            models.save_model(nets[network], folder, input_size=(3, *size))
    run.accelerator.wait_for_everyone()


def measure(
    run: Any, parts: Any, facts: Any, chosen: dict[str, Any], name: str, why: str
) -> dict[str, Any]:
    """The final numbers. All ranks call it; hooks are gone afterwards, for costs are those of the bare networks."""
    split = facts.data.test or facts.data.val
    rows = run.evaluator.networks(split) if split is not None else {name: {}}
    final: dict[str, Any] = rows[name] | {"exported": name, "exported_reason": why}
    if len(rows) > 1:
        final["networks"] = {network: row["top1"] for network, row in rows.items()}
    final |= {"split": split.name if split else None} | chosen | parts.extra
    teacher = run.teacher_metrics.get(f"teacher/{split.name}") if split is not None else None
    if teacher:
        final |= {f"teacher_{k}": v for k, v in teacher.items()}
        final["retention"] = final["top1"] / teacher["top1"] if teacher["top1"] else float("nan")
    parts.release()
    final |= (
        attempt("the cost could not be measured", lambda: _cost(run, parts, facts, final)) or {}
    )
    run.metrics_log.add(event="final", step=run.clock.step, **final)
    return final


def _cost(run: Any, parts: Any, facts: Any, final: dict[str, Any]) -> dict[str, Any]:
    """Each network is measured with images of the size that it gets in training."""
    device, nets = run.accelerator.device, {"student": parts.net}
    if "teacher_top1" in final:
        nets["teacher"] = parts.teachers[0].model
    sizes = {
        name: (3, *(Preprocess.of(net, facts.image).size or facts.image))
        for name, net in nets.items()
    }
    if "teacher" in nets:
        tops = {
            "teacher_top1": final["teacher_top1"],
            "student_top1": final["top1"],
            "num_classes": facts.classes,
        }
        return numbers.summary(nets["teacher"], parts.net, sizes, device=device, **tops)
    cost = numbers.cost(parts.net, sizes["student"], device=device)
    return {"params": cost.params, "macs": cost.macs, "latency_ms": cost.latency_ms}


def report(folder: Path, parts: Any, baseline: Path | None, facts: Any) -> None:
    """report.md and its figures; a failure is told and loses nothing."""
    attempt("report.md could not be written", lambda: _report(folder, parts, baseline, facts))


def _report(folder: Path, parts: Any, baseline: Path | None, facts: Any) -> None:
    split = facts.data.test or facts.data.val
    images = labels = None
    if split is not None:
        batch = facts.data.finish(next(iter(split.loader(8))), epoch=0, train=False)
        images, labels = batch["x"][:8], batch["y"][:8]
    report_room.write(
        folder,
        student=parts.net,
        teacher=parts.teachers[0].model if parts.teachers else None,
        baseline=baseline,
        images=images,
        labels=labels,
        class_names=facts.data.class_names,
    )


def bare(net: nn.Module) -> nn.Module:
    """On the CPU, contiguous, in eval mode, without hooks of taps."""
    return strip(net).cpu().to(memory_format=torch.contiguous_format).eval()


def attempt(what: str, do: Callable[[], Any]) -> Any:
    """What `do` returns; if it fails, the cause on stderr and None: the student is saved already."""
    try:
        return do()
    except Exception as error:
        print(f"kdtoolkit: {what}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
