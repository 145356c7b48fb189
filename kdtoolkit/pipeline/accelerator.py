"""The `accelerate.Accelerator` of a run: the caller's, set up for this run, or a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration

from kdtoolkit.pipeline.config import DistillConfig


def make_accelerator(
    config: DistillConfig, own: Accelerator | None, trackers: list[str], folder: Path | None
) -> Accelerator:
    """The accelerator of a run.

    Args:
        config: The configuration.
        own: The caller's accelerator; it is set up for this run.
        trackers: Names of the experiment trackers.
        folder: Folder of the run.

    Returns:
        `own`, or a new one with a fresh state: accelerate keeps one state per process.

    Raises:
        ValueError: If `own` has another precision, or no trackers where some are wanted.
    """
    precision, accumulation = config.loop.mixed_precision, config.trainer.grad_accum
    loading = DataLoaderConfiguration(
        split_batches=True,
        use_seedable_sampler=True,
        data_seed=config.loop.seed,
        non_blocking=True,
    )
    if own is not None:
        if precision not in (None, own.mixed_precision):
            raise ValueError(
                f"mixed_precision={precision!r}, but the accelerator has {own.mixed_precision!r}"
            )
        if trackers and not own.log_with:
            raise ValueError(
                f"report_to={trackers} and an accelerator without trackers: give it "
                f"log_with={trackers}"
            )
        own.gradient_accumulation_steps = accumulation
        own.dataloader_config = loading
        return own
    AcceleratorState._reset_state()
    GradientState._reset_state()
    log_with: Any = trackers or None
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        dataloader_config=loading,
        log_with=log_with,
        project_dir=str(folder / "trackers") if folder else None,
    )
