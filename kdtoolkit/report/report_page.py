"""report.md of one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from kdtoolkit.report import plots, tables
from kdtoolkit.report.gradcam_figure import gradcam_rows
from kdtoolkit.report.run_folder import Row, RunFolder, put_text, read

SETTINGS = (
    "teacher student method losses layers temperature epochs max_steps batch_size optimizer lr weight_decay scheduler "
    "warmup_epochs teacher_head train_data eval_data num_classes mixed_precision grad_accum grad_clip channels_last "
    "compile seed"
).split()
ENVIRONMENT = (
    "python",
    "torch",
    "timm",
    "accelerate",
    "kdtoolkit",
    "device",
    "gpu",
    "world_size",
    "num_processes",
)

LOAD = """## Load the student

From this folder:

```python
import kdtoolkit  # registers its own networks with timm
import timm

student = timm.create_model("local-dir:student", pretrained=True).eval()
mean, std = student.pretrained_cfg["mean"], student.pretrained_cfg["std"]  # of RGB in [0, 1]
```
"""


def write(
    run_dir: str | os.PathLike[str],
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    baseline: str | os.PathLike[str] | None = None,
    images: Tensor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write report.md and figures/*.png into a run folder, from whatever is in it.

    baseline     run folder of the same student trained alone
    images       (B, 3, H, W) in [0, 1] for the Grad-CAM rows; a student that is not given is loaded from `student/` of
                 its folder, a teacher is left out
    labels       (B,) class ids of the images;  class_names: their names, by class id
    Returns the path of report.md.
    """
    run = read(run_dir)
    alone = read(baseline) if baseline is not None else None
    notes = [
        *run.problems,
        *(f"baseline: {problem}" for problem in (alone.problems if alone else [])),
    ]
    figures = _figures(run, alone, notes)
    if images is not None:
        networks = _networks(run, alone, teacher, student, notes)
        picture = run.path / "figures" / "gradcam.png"
        if _drawn(
            picture.name,
            lambda: gradcam_rows(networks, images, labels, class_names, picture) is not None,
            notes,
        ):
            figures["gradcam.png"] = (
                "Grad-CAM: where each network looks for the class that it chose; red is much, blue is little. "
                "Below each picture the chosen class, green if right, red if wrong."
            )
    rows = _rows(run, alone, teacher, student)
    text = [
        f"# {_title(run)}",
        _opening(run),
        "## Results",
        tables.where_from(run),
        tables.numbers_table(rows),
    ]
    if alone is not None:
        text.append(_gain(run, alone))
    text += [_compression(run), _settings(run)]
    text.append(
        LOAD
        if (run.path / "student").is_dir()
        else "The run folder has no `student/` yet, so there is nothing to load."
    )
    if figures:
        text.append("## Figures")
        text += [
            f"![{name.removesuffix('.png')}](figures/{name})\n\n{caption}"
            for name, caption in figures.items()
        ]
    if notes:
        text += ["## Notes", "\n".join(f"* {note}" for note in dict.fromkeys(notes))]
    put_text(run.path / "report.md", "\n\n".join(part.strip() for part in text if part) + "\n")
    return run.path / "report.md"


def _figures(run: RunFolder, alone: RunFolder | None, notes: list[str]) -> dict[str, str]:
    """Draw the curves; file name -> caption of those that were drawn."""
    folder, split = run.path / "figures", plots.split_of(run) or "eval"
    teacher = tables.teacher_numbers(run, plots.split_of(run))
    level = {f"teacher ({teacher['top1']:.2f} %)": teacher["top1"]} if "top1" in teacher else None

    def curve(name: str, key: str, title: str, unit: str, level: Row | None = None) -> bool:
        lines = plots.eval_curves(run, alone, key)
        return plots.curves(folder / name, title, "epoch", unit, lines, level)

    wanted: dict[str, tuple[Callable[[], bool], str]] = {
        "accuracy.png": (
            lambda: curve(
                "accuracy.png",
                "top1",
                f"Accuracy on the {split} split",
                "top-1 accuracy (%)",
                level,
            ),
            f"Top-1 accuracy on the {split} split after each epoch.",
        ),
        "eval_loss.png": (
            lambda: curve(
                "eval_loss.png", "loss", f"Loss on the {split} split", "cross-entropy (nats)"
            ),
            f"Cross-entropy on the {split} split after each epoch.",
        ),
        "loss.png": (
            lambda: plots.loss_curves(run, folder / "loss.png"),
            "Training loss: terms as weighted in the total; pale: as logged, strong: moving average.",
        ),
    }
    return {name: caption for name, (draw, caption) in wanted.items() if _drawn(name, draw, notes)}


def _drawn(name: str, draw: Callable[[], bool], notes: list[str]) -> bool:
    """A picture that fails is a note: the page and the other pictures are still made."""
    try:
        return draw()
    except ImportError:
        notes.append(plots.HOW_TO)
    except Exception as error:
        reason = (str(error) or "no message").splitlines()[0]
        notes.append(f"no {name}: it could not be drawn ({type(error).__name__}: {reason})")
    return False


def _networks(
    run: RunFolder,
    alone: RunFolder | None,
    teacher: nn.Module | None,
    student: nn.Module | None,
    notes: list[str],
) -> dict[str, nn.Module]:
    name = "distilled" if plots.distilled(run) else "student"
    found = {
        "teacher": teacher,
        "student alone": _load(alone, notes) if alone else None,
        name: student if student is not None else _load(run, notes),
    }
    return {name: model for name, model in found.items() if model is not None}


def _load(run: RunFolder, notes: list[str]) -> nn.Module | None:
    if not (run.path / "student").is_dir():
        notes.append(f"no Grad-CAM row of {run.path.name}: it has no `student/` folder")
        return None
    try:
        return timm.create_model(f"local-dir:{run.path / 'student'}", pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        notes.append(
            f"no Grad-CAM row of {run.path.name}: its student could not be loaded ({reason})"
        )
        return None


def _rows(
    run: RunFolder, alone: RunFolder | None, teacher: nn.Module | None, student: nn.Module | None
) -> dict[str, Row]:
    rows = {}
    found = _with_params(tables.teacher_numbers(run), teacher)
    if found:
        rows["teacher"] = found
    ours = _with_params(tables.student_numbers(run), student)
    if alone is not None:
        cost: Row = {k: ours[k] for k in ("params", "macs", "latency_ms") if k in ours}
        rows["student alone"] = {**cost, **tables.student_numbers(alone)}
    name = "student" if run.product == "student" else f"student ({run.product})"
    rows[f"distilled {name}" if plots.distilled(run) else name] = ours
    for network in run.networks[1:]:
        same: list[Row] = [
            r for r in run.evals(network, ours.get("split")) if r.get("epoch") == ours.get("epoch")
        ]
        rows[network] = (
            same[-1] if same else {"top1": run.last("final").get("networks", {}).get(network)}
        )
    return rows


def _with_params(row: Row, model: nn.Module | None) -> Row:
    counted = {"params": sum(p.numel() for p in model.parameters())} if model is not None else {}
    return {**counted, **row}


def _name(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " + ".join(map(_name, value))
    return str(value).rstrip("/").rsplit("/", 1)[-1] if value else "?"


def _title(run: RunFolder) -> str:
    student, method = _name(run.config.get("student")), _name(run.config.get("method"))
    if not run.config:
        return f"Run {run.path.resolve().name}"
    if not run.config.get("teacher"):
        return f"{student}, method {method}, no teacher"
    teachers = [str(name) for role, name in run.models.items() if role.startswith("teacher")]
    taught_by = " + ".join(teachers) or _name(run.config["teacher"])
    return f"{taught_by} → {run.models.get('student', student)}, method {method}"


def _opening(run: RunFolder) -> str:
    facts = [
        f"{k} {run.env[k]}" for k in ENVIRONMENT if isinstance(run.env.get(k), str | int | float)
    ]
    return f"Made on: {', '.join(facts)}." if facts else ""


def _gain(run: RunFolder, alone: RunFolder) -> str:
    ours, theirs = tables.student_numbers(run), tables.student_numbers(alone)
    if "top1" not in ours or "top1" not in theirs:
        return ""
    text = f"Against the student trained alone: {ours['top1'] - theirs['top1']:+.2f} points of top-1, one run each."
    if (ours.get("split"), ours.get("chosen")) != (theirs.get("split"), theirs.get("chosen")):
        text += f" Compare with care: the numbers of the student alone are of another choice. {tables.where_from(alone)}"
    return text


def _compression(run: RunFolder) -> str:
    parts = tables.compression_parts(run)
    rows = [
        [text, tables.number(key, parts[key])]
        for key, text in tables.PARTS.items()
        if parts.get(key) is not None
    ]
    return (
        "## Task and compression together\n\n" + tables.table(["part", "value"], rows)
        if rows
        else ""
    )


def _settings(run: RunFolder) -> str:
    rows = [
        [f"`{key}`", _shown(run.config[key])] for key in SETTINGS if run.config.get(key) is not None
    ]
    note = "All settings are in `config.yaml`."
    return (
        f"## Settings\n\n{tables.table(['setting', 'value'], rows, right=False)}\n\n{note}"
        if rows
        else ""
    )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
