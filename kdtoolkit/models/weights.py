"""Weights from a file, a folder, the Hub or a state dict into a network that exists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict, load_state_dict_from_hf
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.describe import set_config
from kdtoolkit.models.safetensors_file import config_from_metadata, read_metadata
from kdtoolkit.models.state_dicts import (
    convert_state_dict,
    match_state_dict,
    shorten_list,
    strip_prefix,
    unwrap_state_dict,
)

MIN_SHARE = 0.5  # of the network's parameters that the weights must hold
HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    role: str,
    keep_head: bool = False,
    load: bool = True,
) -> str:
    """Load weights into a network.

    Containers ({"state_dict": ...}, {"model": ...}) and prefixes ("module.", "student.") are
    removed, and timm's own filter of the architecture resamples position tables and patch
    embeddings to the size of the network.

    Args:
        model: The network. One on the meta device is only compared.
        source: PATH.safetensors, .pth or .pt, a folder, "hf-hub:ID", or a state dict. Nothing in a
            file is executed.
        role: "student" or "teacher", for messages.
        keep_head: True, for teachers, gives a timm model as many classes as the weights have, 0 if
            they have no classifier. False, for students, keeps the classes of the network, and
            leaves a classifier with another number of classes out.
        load: Whether to load; False only compares.

    Returns:
        A line that says what matched.

    Raises:
        ValueError: If the source cannot be read, or holds less than half of the network's
            parameters.

    Example:
        ```python
        print(load_weights(student, "pretrained.pth", role="student"))
        ```
    """
    name = f"{role}_weights"
    shown = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a state dict"
    head_keys = [f"{head}.{kind}" for head in _find_head(model) for kind in ("weight", "bias")]
    with torch.device("cpu"):
        raw = unwrap_state_dict(_read(source, name), name)
        state = convert_state_dict(model, strip_prefix(raw, set(model.state_dict())))
    if keep_head:
        _resize_head(model, state, head_keys, name, shown)
    match = match_state_dict(model, state)
    replaced = [key for key in head_keys if key in match.mismatched]
    share = _matched_share(model, match.state, replaced)
    if not match.state or share < MIN_SHARE:
        raise ValueError(
            f"{name}: {shown} fits {share:.0%} of the parameters of {type(model).__name__}; "
            f"{match}. The weights hold {shorten_list(list(raw))}; the network "
            f"{shorten_list(list(model.state_dict()))}. Give weights of this architecture, or "
            f"build it as they need it with {role}_args"
        )
    if load and not any(p.is_meta for p in model.parameters()):
        model.load_state_dict(match.state, strict=False)
        _take_normalisation(model, shown, role)
    return f"{role}: {shown}: {match}" + ("; it gets a new classifier" if replaced else "")


def _matched_share(
    model: nn.Module, matched: Mapping[str, Tensor], replaced: Sequence[str]
) -> float:
    """Share of the network's parameters that the weights hold, 0 to 1, without a replaced head."""
    sizes = {key: p.numel() for key, p in model.named_parameters() if key not in replaced}
    return sum(n for key, n in sizes.items() if key in matched) / max(sum(sizes.values()), 1)


def _take_normalisation(model: nn.Module, path: str, role: str) -> None:
    """Take mean and std of the training images from the metadata of a .safetensors file."""
    if path.endswith(".safetensors") and get_pretrained_cfg(model):
        config = config_from_metadata(read_metadata(Path(path)), Path(path), role)
        config.pop("num_classes", None)
        set_config(model, {**get_pretrained_cfg(model), **config})


def _read(source: object, name: str) -> object:
    """What the file, folder or mapping holds, on the CPU."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{name} is a {type(source).__name__}: a path, 'hf-hub:ID', or a state dict "
            "(net.state_dict())"
        )
    text = str(os.fspath(source))
    is_on_hub = text.startswith(HUB_PREFIXES)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if not is_on_hub and not path.exists():
        raise ValueError(f"{name}: there is no file or folder {path}")
    try:
        if is_on_hub:
            return load_state_dict_from_hf(text.partition(":")[2])
        return load_state_dict_from_path(path) if path.is_dir() else _read_file(path)
    except Exception as error:  # zip, pickle, safetensors, network: each has errors of its own
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{name}: {text} cannot be read ({cause}); allowed are .safetensors, .pth and .pt "
            "files of tensors alone, and folders that hold one"
        ) from error


def _read_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_state_dict(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def _find_head(model: nn.Module) -> list[str]:
    """Names of the classifier: those in a timm model's configuration, else the last nn.Linear."""
    declared = get_pretrained_cfg(model).get("classifier")
    if declared:
        return [declared] if isinstance(declared, str) else list(declared)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]


def _resize_head(
    model: nn.Module,
    state: Mapping[str, Tensor],
    head_keys: Sequence[str],
    name: str,
    shown: str,
) -> None:
    """Give the model a classifier of as many classes as the weights have."""
    held, own = _num_classes(state, head_keys), _num_classes(model.state_dict(), head_keys)
    if held == own:
        return
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is None:
        raise ValueError(
            f"{name}: {shown} holds {held} classes, {type(model).__name__} has {own}: build it "
            "with the classes of its weights"
        )
    with torch.device(next(model.parameters()).device):
        reset(held)


def _num_classes(state: Mapping[str, Tensor], head_keys: Sequence[str]) -> int:
    """Rows of the first classifier tensor; 0 without a classifier."""
    return next((len(state[key]) for key in head_keys if key in state), 0)
