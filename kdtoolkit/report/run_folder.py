"""Reading a run folder, whatever of it is there, and writing files in one move."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]


@dataclasses.dataclass
class RunFolder:
    """What a run folder holds. Missing files are empty; `problems` says in words what could not be read."""

    path: Path
    rows: list[Row]
    config: Row
    env: Row
    problems: list[str]
    models: Row = dataclasses.field(default_factory=dict)  # role -> architecture, from plan.json

    def last(self, event: str) -> Row:
        """The newest row of an event, or an empty one."""
        return next((row for row in reversed(self.rows) if row.get("event") == event), {})

    @property
    def product(self) -> str:
        """The network that the run hands over."""
        return self.last("final").get("exported", "student")

    def evals(self, network: str | None = None, split: str | None = None) -> list[Row]:
        """Evaluations of one network by epoch, the newest of each epoch; by default of the product, on the split with
        most of them."""
        network = network or self.product
        found = [
            r
            for r in self.rows
            if r.get("event") == "eval" and r.get("network", "student") == network
        ]
        splits = [r.get("split") for r in found]
        if split is None and splits:
            split = max(dict.fromkeys(splits), key=lambda s: (splits.count(s), s == "val"))
        by_epoch = {
            r.get("epoch", 0): r for r in found if r.get("split") == split
        }  # a resumed run repeats epochs
        return [by_epoch[epoch] for epoch in sorted(by_epoch)]

    @property
    def networks(self) -> list[str]:
        """Networks and ensembles with evaluations, the product first."""
        names = dict.fromkeys(
            r.get("network", "student") for r in self.rows if r.get("event") == "eval"
        )
        return sorted(names, key=lambda name: name != self.product)

    @property
    def steps_per_epoch(self) -> float | None:
        """Batches in an epoch, from an evaluation's epoch and step; None if no row tells."""
        rows = [
            r for r in self.rows if r.get("event") == "eval" and r.get("epoch") and r.get("step")
        ]
        return rows[-1]["step"] / rows[-1]["epoch"] if rows else None


def read(path: str | os.PathLike[str]) -> RunFolder:
    """Read a run folder. A folder that does not exist is a ValueError; files that are missing in it are not."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; pass the output_dir of a run")
    problems: list[str] = []
    lines = (_load(folder / "metrics.jsonl", str.splitlines, problems)) or []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            row = None
            problems.append(f"metrics.jsonl line {number} is not JSON and is left out")
        if isinstance(row, dict):
            rows.append(row)
    config = _load(folder / "config.yaml", yaml.safe_load, problems)
    env = _load(folder / "env.json", json.loads, problems)
    plan = (
        _load(folder / "plan.json", json.loads, problems)
        if (folder / "plan.json").exists()
        else None
    )
    config, env, plan = (found if isinstance(found, dict) else {} for found in (config, env, plan))
    problems += _not_finite(rows)
    return RunFolder(folder, rows, config, env, problems, plan.get("models") or {})


def _not_finite(rows: list[Row]) -> list[str]:
    bad = [
        (r, k) for r in rows for k, v in r.items() if isinstance(v, float) and not math.isfinite(v)
    ]
    if not bad:
        return []
    row, key = bad[0]
    return [
        f"{len(bad)} logged values are not finite, the first is {key} at step {row.get('step', '?')}: gaps in curves"
    ]


def _load(file: Path, parse: Callable[[str], Any], problems: list[str]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{file.name} could not be read: {str(error).splitlines()[0]}")
    return None


def put(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file next to `file`, then rename it, so that readers never see half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def put_text(file: Path, text: str) -> None:
    """Write a text file in one move."""
    put(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
