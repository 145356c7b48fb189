"""`DistillResult`: what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kdtoolkit.core.run_context import MetricsRow
from kdtoolkit.pipeline.plan import Plan


@dataclass(repr=False)
class DistillResult:
    """What a run leaves.

    Attributes:
        student: The exported model, bare: on the CPU, in eval mode, no hooks, no adapters.
        networks: Every network that was trained or averaged, bare, by name: "student", "peer1",
            "ema", ...
        metrics: Numbers of the chosen epoch. "top1", "top5" (of more than five classes),
            "teacher_top1", "agreement" in percent; "loss" in nats; "ece"; "retention" = top1 /
            teacher_top1; cost and compression (with "retention_above_chance"). "split", "epoch" and
            "chosen" ("last" or "best") say which numbers they are. "exported" names the network
            that they are of, "exported_reason" says why it is this one; "networks" holds the top-1
            of every network and ensemble where there are several. A teacher that was fine-tuned has
            "teacher_finetuned_top1", "_split", "_epoch", "_folder" and "_reused" (found in
            `teacher_dir`).
        history: The rows of metrics.jsonl.
        plan: Taps, shapes, adapters, losses, weights, parameter counts; `print(result.plan)`
            shows it as tables.
        output_dir: The folder of the run; None where nothing was written.
    """

    student: nn.Module
    networks: dict[str, nn.Module] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[MetricsRow] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    output_dir: Path | None = None

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {text}" for name, text in self._facts().items())
        return f"DistillResult({facts})"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        lines = [f"| {name} | {text} |" for name, text in self._facts().items()]
        return "\n".join(["| DistillResult | |", "|---|---|", *lines])

    def _facts(self) -> dict[str, str]:
        """What the run left, a line each."""
        num_parameters = sum(parameter.numel() for parameter in self.student.parameters())
        facts = {"student": f"{type(self.student).__name__} of {num_parameters:,} parameters"}
        found = self.metrics
        if "top1" in found:
            at = f"{found['split']} split, {found['chosen']} epoch, {found['epoch']}"
            facts["top-1"] = f"{found['top1']:.2f} % ({at})"
        if "teacher_top1" in found:
            facts["teacher's top-1"] = f"{found['teacher_top1']:.2f} %"
        if self.output_dir is not None:
            facts["output_dir"] = str(self.output_dir)
        return facts
