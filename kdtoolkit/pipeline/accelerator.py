"""The `accelerate.Accelerator` of a run: the caller's, set up for this run, or a new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration

from kdtoolkit.pipeline.config import DistillConfig
from kdtoolkit.pipeline.config_checks import PRECISIONS


def check_precision(precision: str | None, own: Accelerator | None) -> None:
    """Check that the device of a run computes in a precision.

    Args:
        precision: "no", "bf16", "fp16" or None.
        own: The caller's accelerator, whose device counts.

    Raises:
        ValueError: For "fp16" where there is only a CPU, and for a precision other than that of
            the caller's accelerator.
    """
    if own is not None:
        if precision not in (None, own.mixed_precision):
            raise ValueError(
                f"mixed_precision={precision!r}, but the accelerator has {own.mixed_precision!r}"
            )
        return
    if precision == "fp16" and not _has_gpu():
        raise ValueError(
            "mixed_precision='fp16' needs a GPU, and the device of this run is the CPU: use "
            "'bf16', which a CPU computes, or 'no'"
        )


def _has_gpu() -> bool:
    """Whether accelerate would choose another device than the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return False
    other = getattr(torch, "accelerator", None)  # any device that PyTorch knows
    return torch.cuda.is_available() or (other is not None and bool(other.is_available()))


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
        ValueError: If `own` has another precision, or no trackers where some are wanted, and for
            settings of the launcher that accelerate refuses.
    """
    precision, accumulation = config.loop.mixed_precision, config.trainer.grad_accum
    check_precision(precision, own)
    loading = DataLoaderConfiguration(
        split_batches=True,
        use_seedable_sampler=True,
        data_seed=config.loop.seed,
        non_blocking=True,
    )
    if own is not None:
        if trackers and not own.log_with:
            raise ValueError(
                f"report_to={trackers} and an accelerator without trackers: give it "
                f"log_with={trackers}"
            )
        _check_known_precision(own)
        own.gradient_accumulation_steps = accumulation
        own.dataloader_config = loading
        return own
    AcceleratorState._reset_state()
    GradientState._reset_state()
    log_with: Any = trackers or None
    try:
        made = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=accumulation,
            dataloader_config=loading,
            log_with=log_with,
            project_dir=str(folder / "trackers") if folder else None,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"accelerate refuses its settings: {error} (mixed_precision={precision!r}; what is "
            "None comes from the launcher or from `accelerate config`)"
        ) from error
    _check_known_precision(made)
    return made


def _check_known_precision(accelerator: Accelerator) -> None:
    """Check the precision that an accelerator has from its launcher, or from its maker."""
    found = accelerator.mixed_precision
    if found not in PRECISIONS:
        raise ValueError(
            f"the accelerator has mixed_precision={found!r}, from its maker or its launcher; "
            f"allowed: {', '.join(map(repr, PRECISIONS[1:]))}"
        )
