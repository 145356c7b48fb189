"""A run in a folder that holds an earlier one: replacing it, or returning what it has finished."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext
from kdtoolkit.pipeline.export import bare
from kdtoolkit.pipeline.plan import Plan
from kdtoolkit.pipeline.result import DistillResult
from kdtoolkit.report.run_folder import read
from kdtoolkit.trainer.trainer import Trainer
from kdtoolkit.utils.checkpoint import CheckpointError, check_settings
from kdtoolkit.utils.output_folder import OutputFolder

logger = logging.getLogger(__name__)


class ReplaceEarlierRun(Callback):
    """Removes the run that this one replaces, once this one has its first checkpoint.

    Args:
        output: Folder of the run.
    """

    def __init__(self, output: OutputFolder) -> None:
        self.output = output

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """The checkpoint of the epoch is written."""
        if run.accelerator.is_main_process:
            self.output.checkpoint_written()


def read_finished_run(trainer: Trainer, settings: Mapping[str, Any], plan: Plan) -> DistillResult:
    """The result of a finished run whose checkpoints were removed; nothing is trained.

    Args:
        trainer: The run as it would be trained.
        settings: What the finished run noted of its settings.
        plan: The plan of the run.

    Returns:
        The result, with the networks that the folder holds.

    Raises:
        CheckpointError: If the settings differ, or the student is not there any more.
    """
    folder = trainer.output_dir
    assert folder is not None
    check_settings(
        settings, trainer.checkpoint_metadata, f"{folder} holds a finished run with other settings"
    )
    rows = read(folder).rows
    final = next((row for row in reversed(rows) if row.get("event") == "final"), None)
    if final is None:
        raise CheckpointError(
            f"{folder} holds a finished run without checkpoints, and {folder / 'metrics.jsonl'} "
            "has no final row any more: give another output_dir, or overwrite=True without resume"
        )
    metrics = {name: value for name, value in final.items() if name not in ("event", "step")}
    exported = str(metrics.get("exported", "student"))
    networks = _load_networks(trainer, exported, folder)
    logger.info("%s holds a finished run: nothing is trained", folder)
    return DistillResult(networks[exported], networks, metrics, rows, plan, folder)


def _load_networks(trainer: Trainer, exported: str, folder: Path) -> dict[str, nn.Module]:
    """The exported network, and the others that were saved."""
    own = trainer.method.networks()
    if exported not in own:  # a network that a callback keeps, which is built like the student
        own = {exported: copy.deepcopy(next(iter(own.values()))), **own}
    folders = {name: folder / "networks" / name.replace("/", "-") for name in own}
    folders[exported] = folder / "student"
    found = {name: net for name, net in own.items() if folders[name].is_dir() or name == exported}
    for name, net in found.items():
        file = folders[name] / "model.safetensors"
        try:
            net.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} holds a finished run without checkpoints, and {file} cannot be loaded "
                f"({error}): give another output_dir, or overwrite=True without resume"
            ) from error
    return {name: bare(net) for name, net in found.items()}
