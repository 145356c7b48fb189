"""A .safetensors file: its tensors, and what its metadata says about the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file; empty where it has none.

    Args:
        path: The file.

    Returns:
        Text by key.
    """
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_safetensors(path: Path, role: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a .safetensors file.

    Args:
        path: The file.
        role: How messages call the model, such as "teacher".

    Returns:
        Its metadata, and its tensors on the CPU.

    Raises:
        ValueError: If there is no such file, or it is not complete.
    """
    if not path.is_file():
        raise ValueError(f"{role}: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{role}: {path} is no complete safetensors file: {error}") from error


def config_from_metadata(metadata: Mapping[str, str], path: Path, role: str) -> dict[str, Any]:
    """Read number of classes and input normalisation from metadata, as far as it has them.

    Args:
        metadata: Metadata of a .safetensors file: `num_classes`, `mean` and `std` as text, the
            latter with commas between the channels.
        path: The file, for messages.
        role: How messages call the model, such as "teacher".

    Returns:
        `num_classes` (int), `mean` and `std` (floats), under timm's names.

    Raises:
        ValueError: If one of them is not written so.
    """
    config: dict[str, Any] = {}
    try:
        for key in ("mean", "std"):
            if key in metadata:
                config[key] = tuple(float(number) for number in metadata[key].split(","))
        if "num_classes" in metadata:
            config["num_classes"] = int(metadata["num_classes"])
    except ValueError as error:
        raise ValueError(
            f"{role}: the metadata of {path} is damaged ({error}); expected num_classes as an "
            "integer, mean and std as numbers with commas between"
        ) from error
    return config
