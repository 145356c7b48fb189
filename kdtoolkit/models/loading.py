"""A model from a name, a folder, a file or the Hub.

No head is changed silently: weights from a file, a folder or the Hub keep their classes, or the
call fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg
from kdtoolkit.models.describe import set_config
from kdtoolkit.models.module_checks import exported_program_error
from kdtoolkit.models.safetensors_file import config_from_metadata, read_safetensors
from kdtoolkit.models.source_paths import is_unfinished_run, student_of_run
from kdtoolkit.models.state_dicts import strip_wrappers, unwrap_state_dict
from kdtoolkit.models.timm_models import (
    LoadRequest,
    check_name,
    create_timm_model,
    download_model,
    load_by_name,
    shorten_message,
)
from kdtoolkit.models.weights import HUB_PREFIXES, check_complete, load_exactly
from kdtoolkit.models.weights_file import UnreadableWeights, is_weights_file, read_weights

# Arguments of timm.create_model that do not describe the architecture
NOT_RECORDED = (
    "num_classes",
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
    "exportable",
    "no_jit",
)


def load_model(
    spec: nn.Module | str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    pretrained: bool | None = None,
    role: str = "model",
    **kwargs: Any,
) -> nn.Module:
    """Load a model from a name, a folder, a file or the Hub.

    Args:
        spec: A timm name, "local-dir:PATH" or PATH of a folder, "hf-hub:ID", PATH.safetensors with
            the architecture in its metadata, or an nn.Module, which is returned as it is. The
            folder of a run stands for its exported student.
        num_classes: Number of classes; None takes that of the source. A timm name with published
            weights gets a new head for another number, as in timm; a file, a folder and the Hub
            raise.
        pretrained: Whether to load weights. None loads them, except for a name without a weight tag
            ("resnet18", not "resnet18.a1_in1k").
        role: How messages call the model, such as "teacher".
        **kwargs: Arguments of the model's constructor, such as `shortcut="A"`.

    Returns:
        The model, in train mode, as timm returns it.

    Raises:
        ValueError: If something is wrong with the arguments or the files.
        OSError: If a download fails.

    Example:
        ```python
        teacher = load_model("resnet50.a1_in1k")
        student = load_model("cifar_resnet8", num_classes=10)
        student = load_model("out/student")
        ```
    """
    if isinstance(spec, nn.Module):
        return spec
    if isinstance(spec, torch.export.ExportedProgram):
        raise exported_program_error(role)
    if not isinstance(spec, (str, os.PathLike)):
        is_class = isinstance(spec, type) and issubclass(spec, nn.Module)
        hint = f", {spec.__name__}(...) in place of the class" if is_class else ""
        raise ValueError(
            f"{role}={spec!r}: pass an nn.Module{hint}, a timm name, a folder, hf-hub:ID or "
            "PATH.safetensors"
        )
    text = os.fspath(spec)
    if not text.strip():
        raise ValueError(f"{role}={spec!r} is empty: pass a timm name, or the path of a folder")
    request = LoadRequest(num_classes, pretrained, role, kwargs)
    if text.endswith(".safetensors"):
        model = _load_file(Path(text).expanduser(), request)
    elif text.startswith(HUB_PREFIXES):
        model = _load_from_hub(text, request)
    elif is_weights_file(text) and not Path(text).expanduser().is_dir():
        raise _weights_alone(text, role)
    elif text.startswith("local-dir:") or (not timm.is_model(text) and _is_path(text)):
        model = _load_folder(Path(text.removeprefix("local-dir:")).expanduser(), request)
    else:
        model = load_by_name(text, request)
    _record_args(model, kwargs)
    return model


def is_timm_name(spec: object) -> bool:
    """Tell whether `load_model` takes a value as a timm name.

    Args:
        spec: Any value.

    Returns:
        False for a module, a file, a folder and a name on the Hub.
    """
    if not isinstance(spec, str) or is_weights_file(spec) or not spec.strip():
        return False
    if spec.startswith((*HUB_PREFIXES, "local-dir:")):
        return False
    return timm.is_model(spec) or not _is_path(spec)


def _is_path(text: str) -> bool:
    return "/" in text or os.sep in text or text == "~" or Path(text).expanduser().is_dir()


def _weights_alone(text: str, role: str) -> ValueError:
    """The error for a file that has weights and not the architecture that they are of."""
    path = Path(text).expanduser()
    if not path.exists():
        return ValueError(f"{role}: there is no file {path}")
    try:
        content = read_weights(path)[0]
    except UnreadableWeights as error:
        return ValueError(f"{role}: {error}")
    told = content.get("arch") if isinstance(content, Mapping) else None
    name = told if isinstance(told, str) and timm.is_model(told) else "ARCHITECTURE"
    says = "" if told is None else f", and says arch={told!r}"
    return ValueError(
        f"{role}: {path} holds weights without the architecture that timm would build{says}: pass "
        f"{role}={name!r} and {role}_weights={text!r} (--{role} {name} --{role}-weights {text})"
    )


def _record_args(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Note the arguments that describe the architecture, for `save_model`."""
    args = {
        **getattr(model, "kd_model_args", {}),
        **getattr(model, "pretrained_model_args", {}),
        **kwargs,
    }
    recorded = {key: value for key, value in args.items() if key not in NOT_RECORDED}
    model.kd_model_args = recorded  # type: ignore[assignment]


def _load_from_hub(name: str, request: LoadRequest) -> nn.Module:
    model = download_model(name, request, request.loads_weights)
    _check_classes(model, name, request)
    return model


def _load_folder(folder: Path, request: LoadRequest) -> nn.Module:
    role = request.role
    folder = student_of_run(folder)
    config = _read_config(folder, role)
    if not config.get("architecture"):
        raise ValueError(
            f"{role}: {folder / 'config.json'} names no timm architecture (class: "
            f"{config.get('class')}); create the model yourself, load model.safetensors into it "
            "and pass the nn.Module"
        )
    check_name(config["architecture"], role)
    if request.loads_weights:
        model = _with_folder_weights(folder, request)
    else:
        model = create_timm_model(f"local-dir:{folder}", request, request.num_classes, False)
    _check_classes(model, str(folder), request)
    return model


def _with_folder_weights(folder: Path, request: LoadRequest) -> nn.Module:
    """The model of a folder, with weights that were read here, not by timm."""
    name, problem = (
        f"local-dir:{folder}",
        f"{request.role}: the weights of {folder} cannot be loaded",
    )
    try:
        state = strip_wrappers(unwrap_state_dict(read_weights(folder)[0], problem)[0])
    except UnreadableWeights as error:
        raise ValueError(f"{problem}: {error}") from error
    given = {"source": "", "file": "", "state_dict": state}
    options = {**request.options, "pretrained_cfg_overlay": given}
    with_state = replace(request, options=options)
    try:
        model = create_timm_model(name, with_state, request.num_classes, pretrained=True)
    except (RuntimeError, KeyError) as error:  # of timm's filter, or of load_state_dict
        unloaded = create_timm_model(name, request, request.num_classes, pretrained=False)
        check_complete(unloaded, state, problem, request.role)
        raise ValueError(f"{problem}: {shorten_message(error)}") from error
    config = {key: v for key, v in get_pretrained_cfg(model).items() if key != "state_dict"}
    set_config(model, {**config, "source": "local-dir", "file": str(folder)})
    return model


def _read_config(folder: Path, role: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(
            f"{role}: there is no folder {folder}; for a model of the Hub write 'hf-hub:{folder}'"
        )
    if not path.is_file() and is_unfinished_run(folder):
        raise ValueError(
            f"{role}: {folder} is the folder of a run that has not exported its student: finish "
            "it with resume='auto'; its student/ is loaded then"
        )
    if not path.is_file():
        raise ValueError(
            f"{role}: {folder} has no config.json; expected a folder written by "
            f"kdtoolkit.models.save_model. For weights alone pass {role}='NAME OF THE "
            f"ARCHITECTURE' and {role}_weights={str(folder)!r}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: {path} cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def _check_classes(model: nn.Module, source: str, request: LoadRequest) -> None:
    """Check that loaded weights have the number of classes that was given."""
    own = getattr(model, "num_classes", None)
    held = get_pretrained_cfg(model).get("num_classes", own)
    given = own if request.num_classes is None else request.num_classes
    if request.loads_weights and held != given:
        raise _other_classes(source, held, given, request.role)


def _other_classes(source: str, held: object, given: object, role: str) -> ValueError:
    return ValueError(
        f"{role}: {source} holds {held} classes, num_classes={given} was given; leave num_classes "
        "out and replace the head afterwards with reset_classifier, or pass pretrained=False"
    )


def _load_file(path: Path, request: LoadRequest) -> nn.Module:
    role = request.role
    metadata, state = read_safetensors(path, role)
    name = metadata.get("architecture")
    if not name:
        raise ValueError(
            f"{role}: the metadata of {path} has no 'architecture' (it has: "
            f"{', '.join(sorted(metadata)) or 'nothing'}); create the model yourself and pass the "
            "nn.Module"
        )
    check_name(name, role)
    config = config_from_metadata(metadata, path, role)
    given = request.num_classes
    held = config.get("num_classes", given)
    if request.loads_weights and given not in (None, held):
        raise _other_classes(str(path), held, given, role)
    recorded = {"shortcut": metadata["shortcut"]} if "shortcut" in metadata else {}
    with_recorded = LoadRequest(given, False, role, {**recorded, **request.options})
    num_classes = held if request.loads_weights else given or held
    model = create_timm_model(name, with_recorded, num_classes, pretrained=False)
    set_config(model, {**get_pretrained_cfg(model), **config})
    if request.loads_weights:
        load_exactly(model, state, f"{role}: {path} does not fit {name}", role)
    return model
