"""Reading a run folder, whichever of its files exist."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.utils.paths import expand_home

# of config.yaml; older runs have all settings in one level, and facts of the data under "data"
CONFIG_PARTS = ("networks", "data", "loss", "optim", "loop", "output")
NO_SETTINGS = ("callbacks",)


@dataclass
class RunFolder:
    """What a run folder holds. Files that are missing are empty here.

    Attributes:
        path: The folder.
        rows: Rows of metrics.jsonl.
        config: config.yaml.
        environment: env.json.
        problems: Sentences about what could not be read.
        models: Role ("student", "teacher", ...) -> architecture, from plan.json.
        data: What the plan says of the data.
        changed: Names of the settings that differ from their defaults; None where the run does not
            say it.
    """

    path: Path
    rows: list[MetricsRow]
    config: dict[str, Any]
    environment: dict[str, Any]
    problems: list[str]
    models: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    changed: list[str] | None = None

    @property
    def student_data(self) -> dict[str, Any]:
        """What student/config.json says of its images; empty where there is none."""
        found = _read_mapping(self.path / "student" / "config.json", json.loads, [])
        return found.get("pretrained_cfg") or {}

    def setting_names(self) -> list[str]:
        """Names of the settings in config.yaml, in its order."""
        names: list[str] = []
        for key, value in self.config.items():
            if key == "data" and "train_data" in self.config:
                continue
            if key in CONFIG_PARTS:
                names += value if isinstance(value, Mapping) else [key]
            elif key not in NO_SETTINGS:
                names.append(key)
        return names

    def setting(self, name: str) -> Any:
        """A setting of config.yaml, which is nested in parts, or flat as older runs wrote it.

        Args:
            name: Name of the setting, as the keyword of `distill()`.

        Returns:
            Its value; None where it is not there.
        """
        if name in self.config:
            return self.config[name]
        parts = (part for part in self.config.values() if isinstance(part, Mapping))
        return next((part[name] for part in parts if name in part), None)

    def last_row(self, event: str) -> MetricsRow:
        """The newest row of an event, or an empty one.

        Args:
            event: Value of "event" in metrics.jsonl, such as "eval" or "final".

        Returns:
            The row itself, or {}.
        """
        return next((row for row in reversed(self.rows) if row.get("event") == event), {})

    @property
    def exported(self) -> str:
        """Name of the network that the run exports."""
        final = self.last_row("final")
        # earlier runs have the name under "product"
        return str(final.get("exported", final.get("product", "student")))

    @property
    def networks(self) -> list[str]:
        """Networks and ensembles with evaluations, the exported one first."""
        names = dict.fromkeys(_network(row) for row in self._evaluation_rows())
        return sorted(names, key=lambda name: name != self.exported)

    @property
    def steps_per_epoch(self) -> float | None:
        """Batches in an epoch, from the newest evaluation; None where there is none."""
        rows = [row for row in self._evaluation_rows() if row.get("epoch") and row.get("step")]
        return float(rows[-1]["step"] / rows[-1]["epoch"]) if rows else None

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher took part, as far as the folder shows."""
        final = self.last_row("final")
        return bool(self.setting("teacher") or self.last_row("teacher") or "teacher_top1" in final)

    @property
    def curve_split(self) -> str | None:
        """The split with most evaluations of the exported network; None without evaluations."""
        rows = self.evaluations()
        return rows[0].get("split") if rows else None

    def evaluations(self, network: str | None = None, split: str | None = None) -> list[MetricsRow]:
        """Evaluations of one network, one for each epoch, in order.

        Args:
            network: Its name; by default the exported network.
            split: Name of the split; by default the one with most evaluations, the validation split
                before others.

        Returns:
            Rows of metrics.jsonl; of an epoch that was repeated the newest.
        """
        wanted = network or self.exported
        rows = [row for row in self._evaluation_rows() if _network(row) == wanted]
        if split is None:
            split = _most_frequent_split(rows)
        by_epoch = {row.get("epoch", 0): row for row in rows if row.get("split") == split}
        return [by_epoch[epoch] for epoch in sorted(by_epoch)]

    def _evaluation_rows(self) -> list[MetricsRow]:
        return [row for row in self.rows if row.get("event") == "eval"]


def _network(row: MetricsRow) -> str:
    return str(row.get("network", "student"))


def _most_frequent_split(rows: list[MetricsRow]) -> str | None:
    splits = [row.get("split") for row in rows]
    return max(
        dict.fromkeys(splits),
        key=lambda split: (splits.count(split), split == "val"),
        default=None,
    )


def read(path: str | os.PathLike[str]) -> RunFolder:
    """Read a run folder. Files that are missing or damaged are noted in `RunFolder.problems`.

    Args:
        path: The `output_dir` of a run.

    Raises:
        ValueError: If there is no such folder.
    """
    folder = Path(expand_home(os.fspath(path)))
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass the output_dir of a run")
    problems: list[str] = []
    rows = _read_rows(folder / "metrics.jsonl", problems)
    config = _read_mapping(folder / "config.yaml", yaml.safe_load, problems)
    environment = _read_mapping(folder / "env.json", json.loads, problems)
    plan: dict[str, Any] = {}
    if (folder / "plan.json").exists():
        plan = _read_mapping(folder / "plan.json", json.loads, problems)
    problems += _describe_non_finite(rows)
    return RunFolder(
        folder, rows, config, environment, problems,
        plan.get("models") or {}, plan.get("data") or {}, plan.get("changed"),
    )  # fmt: skip


def _read_rows(file: Path, problems: list[str]) -> list[MetricsRow]:
    rows = []
    for number, line in enumerate(_parse_file(file, str.splitlines, problems) or [], 1):
        row = _parse_json(line)
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip() and row is None:
            problems.append(f"{file.name} line {number} is not JSON and is left out")
    return rows


def _parse_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_mapping(file: Path, parse: Callable[[str], Any], problems: list[str]) -> dict[str, Any]:
    found = _parse_file(file, parse, problems)
    return found if isinstance(found, dict) else {}


def _parse_file(file: Path, parse: Callable[[str], Any], problems: list[str]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{file.name} could not be read: {str(error).splitlines()[0]}")
    return None


def _describe_non_finite(rows: list[MetricsRow]) -> list[str]:
    found = [
        (row, key)
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if not found:
        return []
    row, key = found[0]
    return [
        f"{len(found)} logged values are not finite, the first is {key} at step "
        f"{row.get('step', '?')}: gaps in curves"
    ]
