"""The plan of a run: what is compared with what, through which adapter, with which weight."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kdtoolkit.models.layer_groups import describe_layer_decay

if TYPE_CHECKING:
    from kdtoolkit.core.callback import Callback
    from kdtoolkit.core.config import TrainerConfig
    from kdtoolkit.pipeline.build import RunParts
    from kdtoolkit.pipeline.data_info import DataInfo

MOST_CHARACTERS = 80  # of a value in a line


class Plan(dict[str, Any]):
    """A dictionary that prints as tables.

    Keys: "losses", "parameters", "data", "schedule", "models", "notes".
    """

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=140, highlight=False)
        for key in ("models", "data", "schedule"):
            if self.get(key):
                items = _data_line(self[key]) if key == "data" else _line(self[key])
                console.print(f"{key}: " + ", ".join(items), soft_wrap=True)
        heads = ("student tap", "shape", "teacher tap", "shape", "adapter", "parameters")
        table = Table("loss", "weight", *heads)
        for row in self.get("losses", []):
            table.add_row(*_cells(row))
        console.print(table)
        counts = self.get("parameters", {})
        console.print("parameters: " + ", ".join(f"{k} {_number(v)}" for k, v in counts.items()))
        for note in self.get("notes", []):
            console.print(f"note: {note}")
        return out.getvalue().rstrip()

    __repr__ = __str__


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
    if parts.notes:
        plan["notes"] = [*plan.get("notes", []), *parts.notes]
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
    items = [_short(description["name"]), f"{description['num_classes']} classes"]
    items.append(f"{height}x{width} pixels")
    for split, rows in description.get("rows", {}).items():
        items.append(f"{split} {'streamed' if rows is None else f'{rows:,}'}")
    shown = [key for key in ("validation", "augmentation") if key in description]
    return items + [f"{key} {_short(description[key])}" for key in shown]


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
