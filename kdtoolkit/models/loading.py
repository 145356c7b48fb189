"""A model from a name, a folder, a file or the Hub.

Nothing here changes a head in silence: weights from a file, a folder or the Hub keep their classes or the call fails.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from timm.models import is_model_pretrained
from torch import Tensor, nn

from kdtoolkit.models.weights import metadata_cfg, translated

UNREADABLE = (RuntimeError, OSError, EOFError, SafetensorError, pickle.UnpicklingError)
# the bases are the HTTP library's own error, whichever it is
UNREACHABLE: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)

# say nothing of the model's shape
NOT_RECORDED = "num_classes cache_dir checkpoint_path device dtype pretrained_cfg pretrained_cfg_overlay".split()
NOT_RECORDED += ["scriptable", "exportable", "no_jit"]


def load_model(
    spec: nn.Module | str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    pretrained: bool | None = None,
    role: str = "model",
    **kwargs: Any,
) -> nn.Module:
    """The model that `spec` names.

    spec         nn.Module (returned as it is) | timm name | "local-dir:PATH" or PATH of a folder | "hf-hub:ID"
                 | PATH.safetensors with its architecture in the metadata
    num_classes  None: what the source says. A timm name with published weights gets a new head for another number, as
                 in timm; a file, a folder or the Hub raises
    pretrained   None: load weights, except for a name without weight tag ("resnet18", not "resnet18.a1_in1k")
    role         how messages call the model, such as "teacher"
    kwargs       for the model's constructor, such as shortcut="A"
    Raises ValueError for what is wrong with the arguments or the files, OSError if a download fails.
    """
    if isinstance(spec, nn.Module):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        raise ValueError(
            f"{role}={spec!r}: pass an nn.Module, a timm name, a folder, hf-hub:ID or PATH.safetensors"
        )
    text = os.fspath(spec)
    load = pretrained is not False
    if text.endswith(".safetensors"):
        model = _from_file(Path(text).expanduser(), num_classes, load, role, kwargs)
    elif text.startswith(("hf-hub:", "hf_hub:")):
        model = _download(text, role, pretrained=load, num_classes=num_classes, **kwargs)
        _same_classes(model, text, num_classes, load, role)
    elif text.startswith("local-dir:") or (not timm.is_model(text) and _is_path(text)):
        model = _from_folder(
            Path(text.removeprefix("local-dir:")).expanduser(), num_classes, load, role, kwargs
        )
    else:
        model = _from_name(text, num_classes, pretrained, role, kwargs)
    args = {**getattr(model, "pretrained_model_args", {}), **kwargs}
    recorded = {**getattr(model, "kd_model_args", {}), **args}
    model.kd_model_args = {k: v for k, v in recorded.items() if k not in NOT_RECORDED}
    return model


def is_timm_name(spec: object) -> bool:
    """Whether build() would take `spec` as a timm name, and not as a module, file, folder or name on the Hub."""
    if not isinstance(spec, str) or spec.endswith(".safetensors"):
        return False
    return not spec.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and (
        timm.is_model(spec) or not _is_path(spec)
    )


def _is_path(text: str) -> bool:
    return "/" in text or os.sep in text or Path(text).expanduser().is_dir()


def _known(name: str, role: str) -> None:
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"{role}: unknown model {name!r}; {hint}See timm.list_models()")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(arch)]
    if tag and tag not in tags:
        raise ValueError(
            f"{role}: {arch} has no weights tagged {tag!r}; its tags: {', '.join(tags) or 'none'}"
        )


def _create(name: str, role: str, **kwargs: Any) -> Any:
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        given = ", ".join(k for k, v in kwargs.items() if v is not None)
        raise ValueError(
            f"{role}: {name} does not take these options ({given}): {error}"
        ) from error


def _download(name: str, role: str, **kwargs: Any) -> Any:
    try:
        return _create(name, role, **kwargs)
    except UNREACHABLE as error:
        raise OSError(
            f"{role}: the download failed for {name!r} ({type(error).__name__}: {_short(error)}); to use a local copy "
            'pass "local-dir:PATH" of a folder or the path of a .safetensors file'
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{role}: {name!r} cannot be built: {_short(error)}") from error


def _from_name(
    name: str, num_classes: int | None, pretrained: bool | None, role: str, kwargs: dict[str, Any]
) -> Any:
    _known(name, role)
    load = "." in name if pretrained is None else pretrained
    if load and not is_model_pretrained(name):
        raise ValueError(
            f"{role}: {name} has no published weights; pass pretrained=False to build(), or weights: a folder or a "
            f".safetensors file in place of the name, or {role}_weights=... of distill()"
        )
    call = _download if load else _create
    return call(name, role, pretrained=load, num_classes=num_classes, **kwargs)


def _from_folder(
    folder: Path, num_classes: int | None, load: bool, role: str, kwargs: dict[str, Any]
) -> Any:
    config = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(
            f"{role}: there is no folder {folder}; for a model of the Hub write 'hf-hub:{folder}'"
        )
    if not config.is_file():
        raise ValueError(
            f"{role}: {folder} has no config.json; expected a folder written by kdtoolkit.models.save_model"
        )
    try:
        held = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: {config} cannot be read: {error}") from error
    if not isinstance(held, dict) or not held.get("architecture"):
        cls = held.get("class") if isinstance(held, dict) else None
        raise ValueError(
            f"{role}: {config} names no timm architecture (class: {cls}); create the model yourself, load "
            "model.safetensors into it and pass the nn.Module"
        )
    _known(held["architecture"], role)
    try:
        model = _create(
            f"local-dir:{folder}", role, pretrained=load, num_classes=num_classes, **kwargs
        )
    except UNREADABLE as error:
        raise ValueError(
            f"{role}: the weights of {folder} cannot be loaded: {_short(error)}"
        ) from error
    _same_classes(model, str(folder), num_classes, load, role)
    return model


def _from_file(
    path: Path, num_classes: int | None, load: bool, role: str, kwargs: dict[str, Any]
) -> Any:
    if not path.is_file():
        raise ValueError(f"{role}: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            meta: dict[str, str] = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{role}: {path} is no complete safetensors file: {error}") from error
    name = meta.get("architecture")
    if not name:
        raise ValueError(
            f"{role}: the metadata of {path} has no 'architecture' (it has: {', '.join(sorted(meta)) or 'nothing'}); "
            "create the model yourself and pass the nn.Module"
        )
    _known(name, role)
    cfg = metadata_cfg(meta, path, role)
    options = {**({"shortcut": meta["shortcut"]} if "shortcut" in meta else {}), **kwargs}
    classes = cfg.get("num_classes", num_classes)
    if load and num_classes not in (None, classes):
        raise ValueError(_other_classes(role, str(path), classes, num_classes))
    model = _create(
        name,
        role,
        pretrained=False,
        num_classes=classes if load else num_classes or classes,
        **options,
    )
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **cfg}
    if load:
        _load(model, state, f"{role}: {path} does not fit {name}")
    return model


def _load(model: nn.Module, state: dict[str, Tensor], problem: str) -> None:
    state, own = translated(model, state), model.state_dict()
    shaped = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    result = model.load_state_dict(
        {k: v for k, v in state.items() if k not in shaped}, strict=False
    )
    faults = {
        "missing": [k for k in result.missing_keys if k not in shaped],
        "unexpected": result.unexpected_keys,
        "of another shape": [
            f"{k} (file {tuple(state[k].shape)}, model {tuple(own[k].shape)})" for k in shaped
        ],
    }
    found = [
        f"{len(v)} {k}: {', '.join(v[:3])}{', ...' * (len(v) > 3)}" for k, v in faults.items() if v
    ]
    if found:
        raise ValueError(f"{problem}; {'; '.join(found)}")


def _same_classes(model: Any, source: str, num_classes: int | None, load: bool, role: str) -> None:
    held = model.pretrained_cfg.get("num_classes", model.num_classes)
    wanted = model.num_classes if num_classes is None else num_classes
    if load and held != wanted:
        raise ValueError(_other_classes(role, source, held, wanted))


def _other_classes(role: str, source: str, held: Any, wanted: Any) -> str:
    return (
        f"{role}: {source} holds {held} classes, num_classes={wanted} was asked; leave num_classes out and exchange "
        "the head afterwards with reset_classifier, or pass pretrained=False"
    )


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:400]
