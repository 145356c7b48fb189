"""The numbers of a run on disk: metrics.jsonl (every row, as it comes) and summary.csv (one row an epoch)."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from kdtoolkit.utils.io import to_plain, write_text

MetricsRow = dict[str, Any]


class MetricsLog:
    """Rows of a run, in memory and, on rank 0 with a folder, in metrics.jsonl. A row has "event", "epoch" and "step":

    teacher  a teacher's numbers on a split
    train    mean losses since the last such row; "epoch" counts finished ones
    epoch    mean losses of an epoch
    eval     a network's numbers on a split after an epoch
    final    the numbers of the result
    """

    def __init__(self, folder: Path | None, write: bool = True):
        self.file = folder / "metrics.jsonl" if folder is not None else None
        self.path = self.file if write else None
        self.rows: list[MetricsRow] = []

    def add(self, **row: Any) -> MetricsRow:
        row = to_plain(row)
        self.rows.append(row)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(
                    f"could not write {self.path}: {error}; checkpoints/last is whole: free some space and go on with "
                    "resume='auto'"
                ) from error
        return row

    def rewind(self, step: int) -> None:
        """After a resume: keep what was written up to `step`, drop what came later and an incomplete last line."""
        if self.file is None or not self.file.exists():
            return
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.get("step", 0) <= step and row.get("event") != "final":
                self.rows.append(row)
        if self.path is not None:
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))

    def summary(self) -> None:
        """summary.csv: one row an epoch, the means of its training rows and its evaluations."""
        if self.path is None:
            return
        epochs: dict[int, MetricsRow] = {}
        for row in self.rows:
            if row["event"] == "eval":
                target = epochs.setdefault(
                    row["epoch"], {"epoch": row["epoch"], "step": row["step"]}
                )
                prefix = (
                    row["split"]
                    if row["network"] == "student"
                    else f"{row['split']}/{row['network']}"
                )
                target |= {f"{prefix}/{k}": v for k, v in row.items() if isinstance(v, float)}
            elif row["event"] == "epoch":
                epochs.setdefault(
                    row["epoch"], {"epoch": row["epoch"], "step": row["step"]}
                ).update({f"train/{k}": v for k, v in row.items() if isinstance(v, float)})
        names = list(dict.fromkeys(k for row in epochs.values() for k in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(epochs[e] for e in sorted(epochs))
        write_text(self.path.with_name("summary.csv"), text.getvalue())


def describe_environment(accelerator: Any) -> dict[str, Any]:
    """What a stranger needs to know about the machine: versions, device, processes, command."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (
        "kdtoolkit",
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "datasets",
        "evaluate",
        "numpy",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "packages": versions,
    }
