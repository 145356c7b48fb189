"""The plan of a run: what is compared with what, through which adapter, with which weight."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.layer_groups import describe_layer_decay

if TYPE_CHECKING:
    from rich.console import Console

    from kdtoolkit.core.callback import Callback
    from kdtoolkit.core.config import TrainerConfig
    from kdtoolkit.pipeline.build import RunParts
    from kdtoolkit.pipeline.data_info import DataInfo

MOST_CHARACTERS = 80  # of a value in a line
MOST_CLASSES = 10  # whose names are shown
TRANSFORMS = {  # key of the data -> what it is called
    "augmentation": "training images",
    "evaluation": "evaluation images",
    "student_resize": "resized for the student",
}
HTML_FORMAT = '<pre style="white-space:pre;line-height:normal">{code}</pre>'


class Plan(dict[str, Any]):
    """A dictionary that prints as tables.

    Keys: "losses", "parameters", "data", "schedule", "models", "notes", and "changed", the names of
    the settings that differ from their defaults.
    """

    def __str__(self) -> str:
        return _render(self, html=False)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return _render(self, html=True)


def _render(plan: Mapping[str, Any], *, html: bool) -> str:
    """The plan as plain text, or as HTML. Nothing is printed, in a notebook neither."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file, width=140, highlight=False, markup=False, emoji=False, record=html,
        force_jupyter=False, force_terminal=False, no_color=True, _environ={},
    )  # fmt: skip
    _print(plan, console)
    if html:
        return console.export_html(inline_styles=True, code_format=HTML_FORMAT)
    return file.getvalue().rstrip()


def _print(plan: Mapping[str, Any], console: Console) -> None:
    from rich.table import Table

    for key in ("models", "data", "schedule"):
        if plan.get(key):
            items = _data_line(plan[key]) if key == "data" else _line(plan[key])
            console.print(f"{key}: " + ", ".join(items), soft_wrap=True)
    for key, name in TRANSFORMS.items():
        if plan.get("data", {}).get(key):
            console.print(f"{name}: {plan['data'][key]}", soft_wrap=True)
    heads = ("student tap", "shape", "teacher tap", "shape", "adapter", "parameters")
    table = Table("loss", "weight", *heads)
    for row in plan.get("losses", []):
        table.add_row(*_cells(row))
    console.print(table)
    counts = ", ".join(f"{k} {_number(v)}" for k, v in plan.get("parameters", {}).items())
    console.print(f"parameters: {counts}", soft_wrap=True)
    for note in plan.get("notes", []):
        console.print(f"note: {note}", soft_wrap=True)


def make_plan(
    parts: RunParts,
    info: DataInfo,
    config: TrainerConfig,
    resolved: Mapping[str, Any],
    callbacks: Sequence[Callback],
) -> Plan:
    """The plan of a run.

    Args:
        parts: Networks and method.
        info: The data.
        config: Numbers of the training loop.
        resolved: Field -> what its default became.
        callbacks: The caller's callbacks.

    Returns:
        The plan.
    """
    method = parts.method
    plan = Plan(method.plan())
    for callback in (*method.callbacks, *callbacks):
        plan["losses"] = [*plan.get("losses", []), *callback.plan_rows()]
        plan["notes"] = [*plan.get("notes", []), *callback.plan_notes()]
    plan["models"] = {role: _architecture(net) for role, net in _networks(parts).items()}
    plan["data"] = info.description
    size = Preprocess.from_model(parts.student, info.image_size).size
    if size is not None:
        height, width = info.image_size
        resized = f"{height}x{width} to {size[0]}x{size[1]}, bilinear, in each step"
        plan["data"] = {**plan["data"], "student_resize": resized}
    terms = None if info.data is None else info.data.eval_terms
    is_timms = terms is not None and terms.is_exact and size is None
    plan["data"] = {**plan["data"], "eval_is_timms": is_timms}
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epochs"
    plan["schedule"] = {
        "length": length,
        "batch_size": config.batch_size,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "scheduler": config.scheduler,
    }
    if resolved.get("temperature") is not None:
        plan["schedule"]["temperature"] = resolved["temperature"]
    if parts.parameter_layers is not None:
        assert config.layer_decay is not None
        plan["schedule"]["layer_decay"] = describe_layer_decay(
            parts.student, parts.parameter_layers, config.layer_decay, config.lr
        )
    if parts.frozen_parts is not None:
        counts = plan.get("parameters", {})
        plan["parameters"] = {**counts, "frozen in the student": parts.frozen_parts.num_parameters}
    if info.notes or parts.notes:
        plan["notes"] = [*info.notes, *plan.get("notes", []), *parts.notes]
    return plan


def _networks(parts: RunParts) -> dict[str, nn.Module]:
    nets = {"student": parts.student} | parts.method.networks()
    for number, teacher in enumerate(parts.teachers):
        nets["teacher" if len(parts.teachers) == 1 else f"teacher/{number}"] = teacher.model
    return nets


def _architecture(net: nn.Module) -> str:
    pretrained_cfg: Any = getattr(net, "pretrained_cfg", {})
    return pretrained_cfg.get("architecture") or type(net).__name__


def _line(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} {_short(value)}" for key, value in values.items()]


def _data_line(description: Mapping[str, Any]) -> list[str]:
    """The data in a line; config.yaml holds the rest."""
    height, width = description["image_size"]
    items = [_short(description["name"]), _classes(description)]
    items.append(f"{height}x{width} pixels")
    for split, rows in description.get("rows", {}).items():
        items.append(f"{split} {'streamed' if rows is None else f'{rows:,}'}")
    shown = [key for key in ("validation", "images") if key in description]
    return items + [f"{key} {_short(description[key])}" for key in shown]


def _classes(description: Mapping[str, Any]) -> str:
    """How many classes, and their names in the order of the class ids."""
    text, names = f"{description['num_classes']} classes", description.get("classes") or []
    if names == [str(k) for k in range(len(names))]:  # or there are none
        return text
    shown = ", ".join(f"{k} {name}" for k, name in enumerate(names[:MOST_CLASSES]))
    more = f", ..., {len(names) - 1} {names[-1]}" if len(names) > MOST_CLASSES else ""
    return f"{text} ({shown}{more})"


def _cells(row: Mapping[str, Any]) -> list[str]:
    student, teacher = str(row["student"]), str(row["teacher"])
    parameters = _number(row.get("adapter_parameters"))
    return [
        str(row["loss"]), str(row["weight"]), student, _shape(row, "student"), teacher,
        _shape(row, "teacher"), str(row.get("adapter", "")), parameters,
    ]  # fmt: skip


def _shape(row: Mapping[str, Any], side: str) -> str:
    sizes = row.get(f"{side}_shape")
    if sizes is None:
        return ""
    layout = row[f"{side}_layout"]
    return "x".join(map(str, sizes)) + ("" if layout == "NCHW" else f" {layout}")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."
