"""The classifier of a state dict under another name, and which architecture a state dict fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import timm
import torch
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.state_dicts import is_recomputed

MOST_CANDIDATES = 24  # architectures that are compared with a state dict


def rename_head(
    model: nn.Module, state: Mapping[str, Tensor], heads: Sequence[str]
) -> tuple[dict[str, Tensor], str | None]:
    """Find the classifier of a state dict where it has another name than that of the network.

    Args:
        model: The network.
        state: The state dict, with the network's names as far as it has them.
        heads: Names of the network's classifiers.

    Returns:
        The state dict, and a sentence where one layer was renamed: the only one (a weight, and a
        bias) that is not the network's and has as many columns as its classifier.
    """
    own = model.state_dict()
    if len(heads) != 1 or f"{heads[0]}.weight" in state or f"{heads[0]}.weight" not in own:
        return dict(state), None
    target = own[f"{heads[0]}.weight"]
    has_bias = f"{heads[0]}.bias" in own
    stems = [
        key.removesuffix(".weight")
        for key, value in state.items()
        if key.endswith(".weight") and key not in own and _fits_columns(value, target)
    ]
    stems = [stem for stem in stems if has_bias == (f"{stem}.bias" in state)]
    if len(stems) != 1:
        return dict(state), None
    stem = stems[0]
    renamed = {k: v for k, v in state.items() if k.rpartition(".")[0] != stem}
    weight = state[f"{stem}.weight"]
    renamed[f"{heads[0]}.weight"] = weight.reshape(len(weight), *target.shape[1:])
    if has_bias:
        renamed[f"{heads[0]}.bias"] = state[f"{stem}.bias"]
    return renamed, f"{stem} is taken as the classifier {heads[0]}"


def _fits_columns(value: Tensor, target: Tensor) -> bool:
    """Whether a weight maps the features that a classifier gets; 1 x 1 convolutions count."""
    is_layer = value.dim() == 2 or (value.dim() == 4 and value.shape[2:] == (1, 1))
    return is_layer and value[0].numel() == target[0].numel()


def guess_architecture(
    model: nn.Module, state: Mapping[str, Tensor], head_keys: Sequence[str]
) -> str | None:
    """Find an architecture that a state dict fits exactly, among those named like the network.

    Args:
        model: The network that it does not fit.
        state: The state dict, without prefix.
        head_keys: Names of the classifier's tensors, which are not compared.

    Returns:
        timm's name; None where none of the nearest names fits.
    """
    name = get_pretrained_cfg(model).get("architecture")
    if not name:
        return None
    family = re.split(r"\d", name)[0]
    relatives: list[str] = [other for other in timm.list_models() if other.startswith(family)]
    nearest: list[str] = difflib.get_close_matches(
        str(name), relatives, MOST_CANDIDATES, cutoff=0.0
    )
    shapes = _compared(state, head_keys)
    options = dict(getattr(model, "kd_model_args", {}))
    for candidate in nearest:
        with torch.device("meta"):
            try:
                net = timm.create_model(candidate, **options)
            except Exception:  # it takes other options, or cannot be built on the meta device
                continue
        if candidate != name and _compared(net.state_dict(), head_keys) == shapes:
            return candidate
    return None


def _compared(state: Mapping[str, Tensor], head_keys: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what tells architectures apart."""
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if key not in head_keys and not is_recomputed(key)
    }
