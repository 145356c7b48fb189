"""The sections of a report page as markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.report import tables
from kdtoolkit.report.run_folder import RunFolder

SETTINGS = (
    "teacher",
    "student",
    "method",
    "losses",
    "layers",
    "temperature",
    "epochs",
    "max_steps",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "scheduler",
    "warmup_epochs",
    "teacher_head",
    "teacher_weights",
    "student_weights",
    "options",
    "train_data",
    "eval_data",
    "num_classes",
    "image_size",
    "mixed_precision",
    "grad_accum",
    "grad_clip",
    "channels_last",
    "compile",
    "seed",
)
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
# they are of this folder, or change nothing that is computed
NOT_SHOWN = ("output_dir", "label", "progress", "report_to")
IMAGES = {  # key of the plan's data -> heading
    "augmentation": "training",
    "evaluation": "evaluation",
    "student_resize": "resized for the student",
    "validation": "validation",
}
COSTS = ("params", "macs", "latency_ms")
MARKS = (
    "schedule",
    "transform",
    "callback",
)  # keys of config.yaml that name the class of an object


def page_title(run: RunFolder) -> str:
    """Teacher, student and method of a run.

    Args:
        run: The run.

    Returns:
        The title, without a mark of a heading; the name of the folder where there is no
        config.yaml.
    """
    if not run.config:
        return f"Run {run.path.resolve().name}"
    student, method = _short_name(run.setting("student")), _short_name(run.setting("method"))
    if not run.setting("teacher"):
        return f"{student}, method {method}, no teacher"
    teachers = [str(name) for role, name in run.models.items() if role.startswith("teacher")]
    teacher = " + ".join(teachers) or _short_name(run.setting("teacher"))
    return f"{teacher} → {run.models.get('student', student)}, method {method}"


def _short_name(value: Any) -> str:
    """The last part of a path or name; several are joined."""
    if isinstance(value, (list, tuple)):
        return " + ".join(map(_short_name, value))
    if isinstance(value, Mapping):
        return format_setting(value).rsplit(".", 1)[-1]
    return str(value).rstrip("/").rsplit("/", 1)[-1] if value else "?"


def environment_line(run: RunFolder) -> str:
    """Versions and device of a run; empty where they are not known.

    Args:
        run: The run; its `environment` is read.

    Returns:
        One sentence, or "".
    """
    facts = [
        f"{key} {run.environment[key]}"
        for key in ENVIRONMENT
        if isinstance(run.environment.get(key), (str, int, float))
    ]
    return f"Made on: {', '.join(facts)}." if facts else ""


def network_rows(
    run: RunFolder,
    baseline: RunFolder | None = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
) -> dict[str, MetricsRow]:
    """Metrics of the teacher, the student trained alone, the student, and the other networks.

    Args:
        run: The run.
        baseline: Run of the same student trained alone.
        teacher: The teacher, to count its parameters where the run does not say them.
        student: The student, for the same.

    Returns:
        Name in the table -> metrics.
    """
    rows: dict[str, MetricsRow] = {}
    teacher_row = _num_parameters(teacher) | tables.teacher_metrics(run)
    if teacher_row:
        rows["teacher"] = teacher_row
    student_row = _num_parameters(student) | tables.student_metrics(run)
    if baseline is not None:
        cost = {key: student_row[key] for key in COSTS if key in student_row}
        rows["student alone"] = cost | tables.student_metrics(baseline)
    name = "student" if run.exported == "student" else f"student ({run.exported})"
    rows[f"distilled {name}" if run.has_teacher else name] = student_row
    final_top1 = run.last_row("final").get("networks", {})
    for network in run.networks[1:]:
        evaluations = run.evaluations(network, student_row.get("split"))
        epoch = student_row.get("epoch")
        same_epoch = [row for row in evaluations if row.get("epoch") == epoch]
        rows[network] = same_epoch[-1] if same_epoch else {"top1": final_top1.get(network)}
    return rows


def _num_parameters(model: nn.Module | None) -> MetricsRow:
    return {} if model is None else {"params": sum(p.numel() for p in model.parameters())}


def gain_line(run: RunFolder, baseline: RunFolder) -> str:
    """The student's gain over the student trained alone; empty where one was not evaluated.

    Args:
        run: The run with distillation.
        baseline: The run of the student alone.

    Returns:
        Difference of the top-1 accuracies in points, with a warning where they are of different
        splits or epochs chosen differently; or "".
    """
    ours, theirs = tables.student_metrics(run), tables.student_metrics(baseline)
    if "top1" not in ours or "top1" not in theirs:
        return ""
    text = (
        f"Against the student trained alone: {ours['top1'] - theirs['top1']:+.2f} points of "
        "top-1, one run each."
    )
    if any(ours.get(key) != theirs.get(key) for key in ("split", "chosen")):
        text += (
            " Compare with care: the numbers of the student alone are of another choice. "
            f"{tables.describe_source(baseline)}"
        )
    return text


def compression_section(run: RunFolder) -> str:
    """Retention and compression; empty where they are not known.

    Args:
        run: The run.

    Returns:
        Heading and table, markdown; or "".
    """
    parts = tables.compression_parts(run)
    rows = [
        [heading, tables.format_metric(key, parts[key])]
        for key, heading in tables.COMPRESSION_PARTS.items()
        if parts.get(key) is not None
    ]
    if not rows:
        return ""
    return f"## Task and compression together\n\n{tables.markdown_table(['part', 'value'], rows)}"


def images_section(run: RunFolder) -> str:
    """What is done to images; empty where it is not known.

    Args:
        run: The run; its `data` is read.

    Returns:
        Heading and lines, markdown; or "".
    """
    if "evaluation" not in run.data:
        return ""
    lines = [f"* {name}: {run.data[key]}" for key, name in IMAGES.items() if run.data.get(key)]
    for key in ("mean", "std"):
        if run.student_data.get(key):
            numbers = ", ".join(f"{number:g}" for number in run.student_data[key])
            lines.append(f"* {key} of the normalisation, for pixels in [0, 1]: {numbers}")
    if run.data.get("eval_is_timms"):
        text = "timm's transform of `student/config.json` makes the images of the evaluation."
    else:
        text = (
            "timm's transform of `student/config.json` has the size and normalisation of the "
            "evaluation, but does not make exactly its images."
        )
    return "\n".join(["## Images", "", *lines, "", text])


def settings_section(run: RunFolder) -> str:
    """The settings; empty where they are not known.

    Args:
        run: The run; its `config` is read.

    Returns:
        Heading and table of those in `SETTINGS` that are set, and of all that differ from their
        defaults, markdown; or "".
    """
    main = [name for name in SETTINGS if run.setting(name) not in (None, {})]
    others = [name for name in _changed_settings(run) if name not in (*main, *NOT_SHOWN)]
    rows = [[f"`{name}`", format_setting(run.setting(name))] for name in (*main, *others)]
    callbacks = run.config.get("callbacks")
    if callbacks:
        rows.append(["`callbacks`", format_setting(callbacks)])
    if not rows:
        return ""
    table = tables.markdown_table(["setting", "value"], rows, align_right=False)
    text = "All settings are in `config.yaml`."
    if run.changed is not None:
        text = f"What is not here has its default. {text}"
    return f"## Settings\n\n{table}\n\n{text}"


def _changed_settings(run: RunFolder) -> list[str]:
    """Settings that differ from their defaults; of an older run all that are set."""
    names = run.setting_names()
    if run.changed is not None:
        return [name for name in names if name in run.changed]
    return [name for name in names if run.setting(name) not in (None, {}, "", False)]


def format_setting(value: Any) -> str:
    """A setting of config.yaml as text.

    Args:
        value: A plain value. A mapping with "object", "schedule" or "transform" stands for an
            object of Python, of which it names the class.
    """
    if isinstance(value, Mapping):
        if "object" in value:
            return str(value["object"])
        for mark in MARKS:
            if mark in value:
                arguments = [f"{k}={format_setting(v)}" for k, v in value.items() if k != mark]
                return f"{value[mark]}({', '.join(arguments)})"
        return ", ".join(f"{key} {_format_item(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_format_item, value))
    return str(value)


def _format_item(value: Any) -> str:
    return format_setting(value) if isinstance(value, Mapping) else str(value)
