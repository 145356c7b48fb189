"""The plan of a run: what is compared with what, through which adapter, with which weight; made before training."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table


class Plan(dict[str, Any]):
    """A dict that prints as tables. Keys: "losses", "parameters", "data", "schedule", "models"."""

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=140, highlight=False)
        for key in ("models", "data", "schedule"):
            if self.get(key):
                told = (
                    _data(self[key])
                    if key == "data"
                    else [f"{k} {_short(v)}" for k, v in self[key].items()]
                )
                console.print(f"{key}: " + ", ".join(told), soft_wrap=True)
        table = Table(
            "loss",
            "weight",
            "student tap",
            "shape",
            "teacher tap",
            "shape",
            "adapter",
            "parameters",
        )
        for row in self.get("losses", []):
            table.add_row(
                row["loss"], str(row["weight"]), row["student"], _shape(row, "student"), row["teacher"],
                _shape(row, "teacher"), row.get("adapter", ""), _number(row.get("adapter_parameters")),
            )  # fmt: skip
        console.print(table)
        console.print(
            "parameters: "
            + ", ".join(f"{k} {_number(v)}" for k, v in self.get("parameters", {}).items())
        )
        for note in self.get("notes", []):
            console.print(f"note: {note}")
        return out.getvalue().rstrip()

    __repr__ = __str__


def _data(facts: dict[str, Any]) -> list[str]:
    """The data in a line; config.yaml holds the rest."""
    height, width = facts["image_size"]
    told = [_short(facts["name"]), f"{facts['num_classes']} classes", f"{height}x{width} pixels"]
    for split, rows in facts.get("rows", {}).items():
        told.append(f"{split} {'streamed' if rows is None else f'{rows:,}'}")
    told += [f"{k} {_short(facts[k])}" for k in ("validation", "augmentation") if k in facts]
    return told


def _shape(row: dict[str, Any], side: str) -> str:
    sizes = row.get(f"{side}_shape")
    if sizes is None:
        return ""
    return "x".join(map(str, sizes)) + (
        "" if row[f"{side}_layout"] == "NCHW" else f" {row[f'{side}_layout']}"
    )


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
