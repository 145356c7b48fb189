"""What a call asks for, checked as far as that needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kdtoolkit.callbacks.progress import ProgressLog
from kdtoolkit.callbacks.trackers import resolve_trackers
from kdtoolkit.core.callback import Callback
from kdtoolkit.methods.resolve import ResolvedLosses
from kdtoolkit.pipeline import checks
from kdtoolkit.pipeline.accelerator import check_precision, make_accelerator
from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_file import check_no_marks
from kdtoolkit.pipeline.teacher_finetune import finetuning_fields
from kdtoolkit.trainer.optim import check_optimizer
from kdtoolkit.utils import distributed
from kdtoolkit.utils.logging import configure_logging
from kdtoolkit.utils.output_dir import Claim, claim_output_dir


@dataclass(frozen=True)
class Request:
    """A configuration that has been checked as far as that needs no data.

    Attributes:
        config: The configuration.
        losses: Losses, weights and options of the method; None for a built method.
        resolved: Field -> what its default became.
        callbacks: Callbacks of the caller.
        progress: What prints the progress.
        trackers: Names of the trackers.
        claim: What is done with the output folder.
        accelerator: The accelerator; None in a dry run.
        dry_run: Whether to stop after the plan.
    """

    config: DistillConfig
    losses: ResolvedLosses | None
    resolved: dict[str, Any]
    callbacks: tuple[Callback, ...]
    progress: ProgressLog
    trackers: list[str]
    claim: Claim
    accelerator: Accelerator | None
    dry_run: bool

    @property
    def folder(self) -> Path | None:
        """Folder of the run; None where nothing is written."""
        return self.claim.folder


def check_request(
    config: DistillConfig,
    given_callbacks: Sequence[Callback] | None,
    accelerator: Accelerator | None,
    dry_run: bool,
) -> Request:
    """Check what can be checked without data; nothing is written.

    Args:
        config: The configuration.
        given_callbacks: Callbacks of the caller.
        accelerator: The caller's own; None makes one.
        dry_run: Whether to stop after the plan.

    Returns:
        The request.

    Raises:
        ValueError: For a value that is not allowed, or an output folder that may not be used.
    """
    callbacks = checks.list_callbacks(given_callbacks)
    check_no_marks(config)
    checks.check_data_options(config)
    check_precision(config.loop.mixed_precision, accelerator)
    losses = checks.resolve_method(config)
    resolved = _resolved_fields(config, losses)
    check_optimizer(config.trainer.optimizer)
    finetuning_fields(config)
    output = config.output
    folder = Path(output.output_dir) if output.output_dir is not None else None
    trackers = [] if dry_run else resolve_trackers(config.loop.report_to, folder is not None)
    progress = checks.make_progress_log(config)
    if progress.mode != "off":
        configure_logging()
    checks.check_baseline(config)
    accelerator = None if dry_run else make_accelerator(config, accelerator, trackers, folder)
    claim = Claim(folder)
    if not dry_run:
        claim = distributed.from_main(
            lambda: claim_output_dir(folder, output.resume, output.overwrite)
        )
    return Request(
        config, losses, resolved, callbacks, progress, trackers, claim, accelerator, dry_run,
    )  # fmt: skip


def _resolved_fields(config: DistillConfig, losses: ResolvedLosses | None) -> dict[str, Any]:
    """Field -> what its default became."""
    numbers = ("epochs", "max_steps", "lr", "weight_decay", "batch_size")
    resolved: dict[str, Any] = {name: getattr(config.trainer, name) for name in numbers}
    resolved["temperature"] = checks.resolve_temperature(config, losses)
    resolved["losses"] = {} if losses is None else dict(losses.weights)
    strategy = None if losses is None else losses.strategy
    defaults = {} if strategy is None else dict(strategy.options)
    options = defaults | dict(config.loss.options or {})
    options.pop("temperature", None)
    return resolved | {"options": options}
