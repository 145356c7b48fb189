"""What `env.json` says about the machine and the versions of a run."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

PACKAGES = (
    "kdtoolkit",
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
)


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Describe what somebody else needs to know to repeat a run.

    Args:
        accelerator: The accelerator of the run.

    Returns:
        Command, versions, processor, device, number of processes and precision.
    """
    has_cuda = torch.cuda.is_available()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": torch.cuda.get_device_name() if has_cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
