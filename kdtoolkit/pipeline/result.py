"""`DistillResult`: what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.pipeline.plan import Plan


@dataclass
class DistillResult:
    """What a run leaves.

    Attributes:
        student: The exported model, bare: on the CPU, in eval mode, no hooks, no adapters.
        networks: Every network that was trained or averaged, bare, by name: "student", "peer1",
            "ema", ...
        metrics: Numbers of the chosen epoch. "top1", "top5", "teacher_top1", "agreement" in
            percent; "loss" in nats; "ece"; "retention" = top1 / teacher_top1; cost and compression
            (with "retention_above_chance"). "split", "epoch" and "chosen" ("last" or "best") say
            which numbers they are. "exported" names the network that they are of, "exported_reason"
            says why it is this one; "networks" holds the top-1 of every network and ensemble where
            there are several. A teacher that was fine-tuned has "teacher_finetuned_top1", "_split",
            "_epoch", "_folder" and "_reused" (found in `teacher_dir`).
        history: The rows of metrics.jsonl.
        plan: Taps, shapes, adapters, losses, weights, parameter counts; printable.
        output_dir: The folder of the run; None where nothing was written.
    """

    student: nn.Module
    networks: dict[str, nn.Module] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[MetricsRow] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    output_dir: Path | None = None
