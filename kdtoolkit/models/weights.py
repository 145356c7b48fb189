"""Weights from a file, a folder, the Hub or a state dict into a network that exists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict_from_hf
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.describe import set_config
from kdtoolkit.models.safetensors_file import config_from_metadata, read_metadata
from kdtoolkit.models.source_paths import student_of_run
from kdtoolkit.models.state_dicts import (
    convert_state_dict,
    is_recomputed,
    match_state_dict,
    shorten_list,
    strip_prefix,
    unwrap_state_dict,
)
from kdtoolkit.models.weight_naming import guess_architecture, rename_head
from kdtoolkit.models.weights_file import UnreadableWeights, read_weights

MIN_SHARE = 0.5  # of the network's parameters that the weights must hold
HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    role: str,
    keep_head: bool = False,
    head_is_trained: bool = False,
    load: bool = True,
) -> str:
    """Load weights into a network.

    Containers ({"state_dict": ...}, {"model": ...}) and prefixes ("module.", "student.") are
    removed, a classifier under another name is found, and timm's own filter of the architecture
    resamples position tables and patch embeddings to the size of the network.

    Args:
        model: The network. One on the meta device is only compared.
        source: PATH.safetensors, .pth, .pt, .bin, .ckpt or .pth.tar, a folder, "hf-hub:ID", or a
            state dict. Nothing in a file is executed.
        role: "student" or "teacher", for messages.
        keep_head: True, for teachers, gives a timm model as many classes as the weights have, 0 if
            they have no classifier, and demands every other tensor of the network. False, for
            students, keeps the classes of the network, leaves a classifier with another number of
            classes out, and loads what there is.
        head_is_trained: With `keep_head`, whether the classifier is trained next, or not used, so
            that one of a network that is not timm's may be missing.
        load: Whether to load; False only compares.

    Returns:
        A line that says what matched.

    Raises:
        ValueError: If the source cannot be read, holds less than half of the network's parameters,
            or, with `keep_head`, is not the whole network.

    Example:
        ```python
        print(load_weights(student, "pretrained.pth", role="student"))
        ```
    """
    name = f"{role}_weights"
    shown = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a state dict"
    head_keys = _head_keys(model)
    with torch.device("cpu"):
        content, file_note = _read(source, name)
        raw, container_note = unwrap_state_dict(content, name)
        state = convert_state_dict(model, strip_prefix(raw, set(model.state_dict())))
        state, head_note = rename_head(model, state, _find_head(model))
    if keep_head:
        state = _resize_head(model, state, head_keys, name, shown, may_differ=head_is_trained)
    match = match_state_dict(model, state)
    replaced = [key for key in head_keys if key in match.mismatched]
    if keep_head:
        optional = head_keys if head_is_trained else []
        check_complete(model, state, f"{name}: {shown}", role, optional)
    share = _matched_share(model, match.state, replaced)
    if not match.state or share < MIN_SHARE:
        raise ValueError(
            f"{name}: {shown} fits {share:.0%} of the parameters of {type(model).__name__}; "
            f"{match}. The weights hold {shorten_list(list(raw))}; the network "
            f"{shorten_list(list(model.state_dict()))}. {_advice(model, state, role)}"
        )
    if load and not any(p.is_meta for p in model.parameters()):
        model.load_state_dict(match.state, strict=False)
        _take_normalisation(model, shown, role)
    notes = [note for note in (file_note, container_note, head_note) if note]
    notes += ["it gets a new classifier"] if replaced else []
    return f"{role}: {shown}: {'; '.join([str(match), *notes])}"


def check_complete(
    model: nn.Module,
    state: Mapping[str, Tensor],
    problem: str,
    role: str,
    optional: Sequence[str] = (),
) -> None:
    """Check that a state dict holds the whole network, and is not that of a larger one.

    Args:
        model: The network.
        state: The state dict, which timm's filter is applied to first.
        problem: Beginning of the message, such as "teacher_weights: x.pth".
        role: "student" or "teacher", for the message.
        optional: Names of tensors that may be missing.

    Raises:
        ValueError: If it is not, with the architecture that it fits, if one is found.
    """
    match = match_state_dict(model, convert_state_dict(model, state))
    parts = {name for name, _ in model.named_children()}
    faults = {
        "missing": [key for key in match.missing if key not in optional],
        "of another shape": [text for key, text in match.mismatched.items() if key not in optional],
        # other parts, such as a head for training alone, are not used
        "left over": [key for key in match.unexpected if key.partition(".")[0] in parts],
    }
    found = [f"{len(keys)} {kind} ({shorten_list(keys)})" for kind, keys in faults.items() if keys]
    if not found:
        return
    total = len(match.state) + len(match.missing) + len(match.mismatched)
    architecture = get_pretrained_cfg(model).get("architecture") or type(model).__name__
    raise ValueError(
        f"{problem}: not the whole network {architecture}: {len(match.state)} of {total} tensors "
        f"fit; {'; '.join(found)}. A {role} needs all of its weights. "
        f"{_advice(model, state, role)}"
    )


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], problem: str, role: str) -> None:
    """Load a state dict whose names and shapes must be those of the model.

    Args:
        model: The model.
        state: The state dict, which `convert_state_dict` is applied to first.
        problem: Beginning of the error message.
        role: How messages call the model, such as "teacher".

    Raises:
        ValueError: If a tensor is missing, unexpected, or of another shape.
    """
    state = convert_state_dict(model, state)
    own = model.state_dict()
    mismatched = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    fitting = {k: v for k, v in state.items() if k not in mismatched}
    result = model.load_state_dict(fitting, strict=False)
    faults = {
        "missing": [k for k in result.missing_keys if k not in mismatched and not is_recomputed(k)],
        "unexpected": [key for key in result.unexpected_keys if not is_recomputed(key)],
        "of another shape": [
            f"{key} (file {tuple(state[key].shape)}, model {tuple(own[key].shape)})"
            for key in mismatched
        ],
    }
    found = [_describe_fault(kind, keys) for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{problem}; {'; '.join(found)}. {_advice(model, state, role)}")


def _describe_fault(kind: str, keys: list[str]) -> str:
    ellipsis = ", ..." if len(keys) > 3 else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:3])}{ellipsis}"


def _advice(model: nn.Module, state: Mapping[str, Tensor], role: str) -> str:
    """What to do with weights that do not fit."""
    fitting = guess_architecture(model, state, _head_keys(model))
    if fitting is not None:
        return f"They fit {fitting}: pass {role}={fitting!r} with these weights"
    options = f" with {role}_args" if role in ("student", "teacher") else ""
    return f"Give weights of this architecture, or build it as they need it{options}"


def _head_keys(model: nn.Module) -> list[str]:
    return [f"{head}.{kind}" for head in _find_head(model) for kind in ("weight", "bias")]


def _matched_share(
    model: nn.Module, matched: Mapping[str, Tensor], replaced: Sequence[str]
) -> float:
    """Share of the network's parameters that the weights hold, 0 to 1, without a replaced head."""
    sizes = {key: p.numel() for key, p in model.named_parameters() if key not in replaced}
    return sum(n for key, n in sizes.items() if key in matched) / max(sum(sizes.values()), 1)


def _take_normalisation(model: nn.Module, path: str, role: str) -> None:
    """Take mean and std of the training images from the metadata of a .safetensors file."""
    if path.endswith(".safetensors") and get_pretrained_cfg(model):
        file = Path(path).expanduser()
        config = config_from_metadata(read_metadata(file), file, role)
        config.pop("num_classes", None)
        set_config(model, {**get_pretrained_cfg(model), **config})


def _read(source: object, name: str) -> tuple[object, str | None]:
    """What the file, folder or mapping holds, on the CPU; a note where a file was chosen."""
    if isinstance(source, Mapping):
        return source, None
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{name} is a {type(source).__name__}: a path, 'hf-hub:ID', or a state dict "
            "(net.state_dict())"
        )
    text = str(os.fspath(source))
    if text.startswith(HUB_PREFIXES):
        return _read_from_hub(text, name), None
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if not path.exists():
        raise ValueError(f"{name}: there is no file or folder {path}")
    try:
        return read_weights(student_of_run(path))
    except UnreadableWeights as error:
        raise ValueError(f"{name}: {error}") from error


def _read_from_hub(text: str, name: str) -> object:
    try:
        return load_state_dict_from_hf(text.partition(":")[2])
    except Exception as error:  # network, pickle, safetensors: each has errors of its own
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name}: {text} cannot be read ({cause})") from error


def _find_head(model: nn.Module) -> list[str]:
    """Names of the classifier: those in a timm model's configuration, else the last nn.Linear."""
    declared = get_pretrained_cfg(model).get("classifier")
    if declared:
        return [declared] if isinstance(declared, str) else list(declared)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]


def _resize_head(
    model: nn.Module,
    state: dict[str, Tensor],
    head_keys: Sequence[str],
    name: str,
    shown: str,
    *,
    may_differ: bool,
) -> dict[str, Tensor]:
    """Give the model a classifier of as many classes as the weights have.

    Returns:
        The state dict; without its classifier where the model keeps its own.
    """
    held, own = _num_classes(state, head_keys), _num_classes(model.state_dict(), head_keys)
    if held == own:
        return state
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is None and may_differ:
        return {key: value for key, value in state.items() if key not in head_keys}
    if reset is None:
        raise ValueError(
            f"{name}: {shown} holds {held} classes, {type(model).__name__} has {own}: build it "
            "with the classes of its weights"
        )
    with torch.device(next(model.parameters()).device):
        reset(held)
    return state


def _num_classes(state: Mapping[str, Tensor], head_keys: Sequence[str]) -> int:
    """Rows of the first classifier tensor; 0 without a classifier."""
    return next((len(state[key]) for key in head_keys if key in state), 0)
