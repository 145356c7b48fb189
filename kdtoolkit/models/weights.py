"""Weights from a file, a folder, the Hub or a state dict into a network, and a line that says what matched.

Containers ({"state_dict": ...}, {"model": ...}) and prefixes ("module.", "student.") are taken off. timm's own filter
of the architecture resamples position tables and patch embeddings to the network's size.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.models import load_state_dict, load_state_dict_from_hf, model_entrypoint
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

from kdtoolkit.features.preprocess import config_of

CONTAINERS = (
    "state_dict_ema model_ema state_dict model student teacher network net module weights".split()
)
LEAST = 0.5  # share of the network's parameters that must be found


@dataclass
class Fit:
    """How a state dict fits a network: `state` is what fits, the lists are names, with both shapes in `shaped`. The
    counters of BatchNorm are not missed."""

    state: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    shaped: dict[str, str]

    def __str__(self) -> str:
        total = len(self.state) + len(self.missing) + len(self.shaped)
        told = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of other shape": list(self.shaped.values()),
        }
        return f"{len(self.state)} of {total} tensors matched; " + "; ".join(
            f"{what}: {shorten_list(names)}" for what, names in told.items()
        )


def load_weights(
    model: nn.Module, source: Any, *, role: str, keep_head: bool = False, load: bool = True
) -> str:
    """Load `source` into `model`; returns a line that says what matched. A network on the meta device is only compared.

    source     PATH.safetensors, .pth or .pt, a folder, "hf-hub:ID", or a state dict
    keep_head  True (teachers): a timm model gets as many classes as the weights have, 0 if they have no classifier.
               False (students): the network's classes stay, and a classifier of another number is left out
    Raises ValueError where less than half of the network's parameters are found.
    """
    name = f"{role}_weights"
    shown = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "a state dict"
    heads = [f"{head}.{kind}" for head in _heads(model) for kind in ("weight", "bias")]
    with torch.device("cpu"):
        raw = _unwrapped(_read(source, name), name)
        state = translated(model, _without_prefix(raw, set(model.state_dict())))
    if keep_head:
        _take_classes(model, state, heads, name, shown)
    fit = compared(model, state)
    new_head = [key for key in heads if key in fit.shaped]
    sizes = {k: p.numel() for k, p in model.named_parameters() if k not in new_head}
    share = sum(n for k, n in sizes.items() if k in fit.state) / max(sum(sizes.values()), 1)
    if not fit.state or share < LEAST:
        raise ValueError(
            f"{name}: {shown} fits {share:.0%} of the parameters of {type(model).__name__}; {fit}. The weights hold "
            f"{shorten_list(list(raw))}; the network {shorten_list(list(model.state_dict()))}. Give weights of this architecture, or "
            f"build it as they need it with {role}_args"
        )
    if load and not any(p.is_meta for p in model.parameters()):
        model.load_state_dict(fit.state, strict=False)
        _take_statistics(model, shown, role)
    return f"{role}: {shown}: {fit}" + ("; it gets a new classifier" if new_head else "")


def _take_statistics(model: nn.Module, path: str, role: str) -> None:
    """mean and std of the images that a .safetensors file was trained on, where its metadata has them."""
    if path.endswith(".safetensors") and config_of(model):
        with safe_open(path, "pt") as file:
            cfg = metadata_cfg(file.metadata() or {}, Path(path), role)
        cfg.pop("num_classes", None)
        model.pretrained_cfg = model.default_cfg = {**config_of(model), **cfg}  # type: ignore[assignment]


def shorten_list(names: list[str], most: int = 4) -> str:
    """The first few of a list, for messages."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest


def translated(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` through the filter that timm has for the architecture, if names or shapes differ from the network's."""
    own, change = model.state_dict(), _filter_of(model)
    if change is None or all(k in own and v.shape == own[k].shape for k, v in state.items()):
        return dict(state)
    return dict(change(dict(state), model))


def compared(model: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    own = model.state_dict()
    shaped = {
        k: f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    }
    return Fit(
        {k: v for k, v in state.items() if k in own and k not in shaped},
        [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        [k for k in state if k not in own],
        shaped,
    )


def _read(source: Any, name: str) -> Any:
    """What the file, folder or mapping holds, on the CPU; nothing in it is run."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{name} is a {type(source).__name__}: a path, 'hf-hub:ID', or a state dict (net.state_dict())"
        )
    text = os.fspath(source)
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if not text.startswith(("hf-hub:", "hf_hub:")) and not path.exists():
        raise ValueError(f"{name}: there is no file or folder {path}")
    try:
        if text.startswith(("hf-hub:", "hf_hub:")):
            return load_state_dict_from_hf(text.partition(":")[2])
        return load_state_dict_from_path(path) if path.is_dir() else _file(path)
    except Exception as error:  # zip, pickle, safetensors, network: each has errors of its own
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{name}: {text} cannot be read ({cause}); allowed are .safetensors, .pth and .pt files of tensors alone, "
            "and folders that hold one"
        ) from error


def _file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_state_dict(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def metadata_cfg(meta: dict[str, str], path: Path, role: str) -> dict[str, Any]:
    """num_classes, mean and std of a safetensors file, as far as it has them."""
    try:
        cfg: dict[str, Any] = {
            k: tuple(map(float, meta[k].split(","))) for k in ("mean", "std") if k in meta
        }
        return {
            **cfg,
            **({"num_classes": int(meta["num_classes"])} if "num_classes" in meta else {}),
        }
    except ValueError as error:
        raise ValueError(
            f"{role}: the metadata of {path} is damaged ({error}); expected num_classes as an integer, mean and std as "
            "numbers with commas between"
        ) from error


def _unwrapped(raw: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, out of its containers."""
    while isinstance(raw, Mapping):
        inner = next(
            (raw[key] for key in CONTAINERS if isinstance(raw.get(key), Mapping) and raw[key]), None
        )
        if inner is None:
            break
        raw = inner
    tensors = (
        {str(k): v for k, v in raw.items() if isinstance(v, Tensor)}
        if isinstance(raw, Mapping)
        else {}
    )
    if not tensors:
        keys = (
            shorten_list([str(k) for k in raw]) if isinstance(raw, Mapping) else type(raw).__name__
        )
        raise ValueError(
            f"{name}: no tensors are in it, but {keys}; allowed: a state dict, or one under 'state_dict'"
        )
    return tensors


def _without_prefix(state: Mapping[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """The part of `state` behind the prefix ("module.", "student.") that makes most names those of the network."""
    prefixes = dict.fromkeys(
        ["", *(k[: i + 1] for k in state for i, c in enumerate(k) if c == ".")]
    )
    best = max(
        prefixes,
        key=lambda p: (sum(k.startswith(p) and k[len(p) :] in own for k in state), -len(p)),
    )
    if not any(
        k.startswith(best) and k[len(best) :] in own for k in state
    ):  # foreign names: left to timm's filter
        best = next(
            (
                p
                for p in ("_orig_mod.module.", "module.", "_orig_mod.")
                if all(k.startswith(p) for k in state)
            ),
            "",
        )
    return {k[len(best) :]: v for k, v in state.items() if k.startswith(best)}


def _filter_of(model: nn.Module) -> Any:
    """timm's checkpoint_filter_fn, in the file of the architecture's constructor or of its class."""
    name = config_of(model).get("architecture")
    try:
        files = [model_entrypoint(name).__module__] if name else []
    except RuntimeError:
        files = []
    rooms = (
        importlib.import_module(file)
        for file in (*files, type(model).__module__)
        if file.startswith("timm.")
    )
    return next(
        (change for room in rooms if (change := getattr(room, "checkpoint_filter_fn", None))), None
    )


def _heads(model: nn.Module) -> list[str]:
    """Names of the classifier: what a timm model's configuration says, else the last nn.Linear."""
    named = config_of(model).get("classifier")
    if named:
        return [named] if isinstance(named, str) else list(named)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]


def _take_classes(
    model: Any, state: Mapping[str, Tensor], heads: list[str], name: str, shown: str
) -> None:
    held = next((len(state[key]) for key in heads if key in state), 0)
    own = model.state_dict()
    has = next((len(own[key]) for key in heads if key in own), 0)
    if held == has:
        return
    if not hasattr(model, "reset_classifier"):
        raise ValueError(
            f"{name}: {shown} holds {held} classes, {type(model).__name__} has {has}: build it with the classes of its "
            "weights"
        )
    first = next(model.parameters())
    with torch.device(first.device):
        model.reset_classifier(held)
