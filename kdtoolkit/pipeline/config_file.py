"""`config.yaml`: a configuration as plain values.

Every run writes it, and it starts the same run again.

Schedules, augmentations and the callbacks of this package are written as their class and arguments.
What YAML cannot hold (a network that was passed as a module, a data set object, a callback of your
own) is written as a mark that says what to pass in its place.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kdtoolkit.pipeline.config import FIELD_NAMES, FIELD_PART, DistillConfig, check_keywords
from kdtoolkit.utils.registry import suggestion
from kdtoolkit.utils.validation import describe_value, plain_scalar

if TYPE_CHECKING:
    from kdtoolkit.core.callback import Callback

NOT_WRITTEN = ("resume", "overwrite")  # they say how this start was made, not what was run
OBJECT = "object"  # key of the mark of a value that YAML cannot hold


# ------------------------------------------------------------------------------------- writing
def config_to_plain(
    config: DistillConfig, resolved: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """A configuration in plain values, nested as `DistillConfig`.

    Args:
        config: The configuration.
        resolved: Field -> what its default became.
        callbacks: The caller's callbacks.

    Returns:
        Part -> field -> value, and "callbacks".
    """
    values = config.flat() | dict(resolved)
    parts: dict[str, Any] = {}
    for name, part in FIELD_PART.items():
        if name not in NOT_WRITTEN:
            parts.setdefault(part, {})[name] = to_plain_value(values[name])
    return parts | {"callbacks": [callback_to_plain(c) for c in callbacks]}


def to_plain_value(value: Any) -> Any:
    """A value as YAML can hold it.

    Args:
        value: Any value of a configuration.

    Returns:
        None, a number or text as it is; a path as text; a list or tuple as a list; a mapping as a
        dict with names as text; an object of a known class as a dict of its class and fields. What
        YAML cannot hold, a state dict included, becomes `{"object": what it is}`.
    """
    from torch import Tensor, nn

    value = plain_scalar(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [to_plain_value(item) for item in value]
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        tensors = sum(isinstance(item, Tensor) for item in value.values())
        if tensors:
            return {OBJECT: f"state dict of {tensors} tensors"}
        return {str(name): to_plain_value(item) for name, item in value.items()}
    for kind, classes in _known_classes().items():
        if type(value) in classes:
            own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {kind: type(value).__name__, **{k: to_plain_value(v) for k, v in own.items()}}
    return {OBJECT: f"{type(value).__module__}.{type(value).__qualname__}"}


def callback_to_plain(callback: Callback) -> dict[str, Any]:
    """A callback as its class and all its arguments, defaults included.

    Args:
        callback: The callback.

    Returns:
        The class under "callback", or under "object" if it is not a known one; and
        argument -> plain value.
    """
    args, keywords = callback.init_arguments
    bound = inspect.signature(type(callback)).bind(*args, **keywords)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= {k: to_plain_value(v) for k, v in value.items()}
        else:
            arguments[name] = to_plain_value(value)
    if type(callback) in _callback_classes():
        return {"callback": type(callback).__name__, **arguments}
    return {OBJECT: f"{type(callback).__module__}.{type(callback).__qualname__}", **arguments}


def _known_classes() -> dict[str, list[type]]:
    """Mark -> classes of frozen data classes that are written as their fields."""
    from kdtoolkit import schedules
    from kdtoolkit.data.augment import BatchAugment

    frozen = [
        item
        for item in vars(schedules).values()
        if isinstance(item, type) and dataclasses.is_dataclass(item)
    ]
    return {"schedule": frozen, "transform": [BatchAugment]}


def _callback_classes() -> list[type]:
    from kdtoolkit import callbacks
    from kdtoolkit.core.callback import Callback

    named = (getattr(callbacks, name) for name in callbacks.__all__)
    return [item for item in named if isinstance(item, type) and issubclass(item, Callback)]


# ------------------------------------------------------------------------------------- reading
def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | DistillConfig,
) -> DistillConfig:
    """A configuration from a YAML file, a mapping or a configuration.

    Args:
        source: Path of a YAML file (or of a run's folder, whose `config.yaml` is read); a mapping,
            nested as `DistillConfig` or flat as the keywords of `distill()`; or a `DistillConfig`,
            which is returned as it is.

    Returns:
        The configuration. Values that YAML could not hold are marks: replace them before the run
        starts.

    Raises:
        ValueError: If the file cannot be read, or a name in it is unknown.
    """
    if isinstance(source, DistillConfig):
        return source
    where = "config"
    if isinstance(source, (str, os.PathLike)):
        where = os.fspath(source)
        source = _load(Path(source).expanduser())
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} holds {type(source).__name__}; a mapping of fields is needed")
    keywords: dict[str, Any] = {}
    parts = set(FIELD_PART.values())
    for name, value in source.items():
        if name == "callbacks":
            continue
        if name in parts:
            own = tuple(f for f, part in FIELD_PART.items() if part == name)
            given = _mapping({} if value is None else value, f"{where}: {name}", "fields")
            check_keywords(given, own, f"{where}: {name}")
            keywords |= given
        else:
            check_keywords({name: value}, FIELD_NAMES, where)
            keywords[name] = value
    return DistillConfig.from_keywords(**{k: _restored(k, v) for k, v in keywords.items()})


def read_callbacks(source: str | os.PathLike[str] | Mapping[str, Any] | DistillConfig) -> list[Any]:
    """The callbacks that a `config.yaml` names.

    Args:
        source: As for `read_config`.

    Returns:
        The callbacks, newly made.

    Raises:
        ValueError: If one of them is not of this package: pass it as `callbacks=[...]`.
    """
    if isinstance(source, DistillConfig):
        return []
    from_file = isinstance(source, (str, os.PathLike))
    found: Mapping[str, Any] = _load(Path(source).expanduser()) if from_file else source  # type: ignore[arg-type, assignment]
    made = []
    entries = found.get("callbacks") or []
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"callbacks is {describe_value(entries)}; a list is needed")
    for entry in entries:
        _mapping(entry, "callbacks", "a class and its arguments")
        if "callback" not in entry:
            raise ValueError(
                f"the configuration names a callback of your own, {entry.get(OBJECT)}: pass it, "
                "and the others of the "
                "run, with callbacks=[...]"
            )
        known = {c.__name__: c for c in _callback_classes()}
        arguments = {k: _restored(k, v) for k, v in entry.items() if k != "callback"}
        name = entry["callback"]
        if name not in known:
            hint = suggestion(str(name), known) or "."
            raise ValueError(f"callbacks: unknown {name!r}{hint} Known: {', '.join(known)}")
        made.append(_called(known[name], arguments, "callbacks"))
    return made


def _mapping(value: Any, where: str, content: str) -> dict[str, Any]:
    """A mapping of names as a dict; `ValueError` if it is none."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where} holds {describe_value(value)}; a mapping of {content} is needed")
    return dict(value)


def _called(cls: type, arguments: Mapping[str, Any], where: str) -> Any:
    """An object of a class that a file names; `ValueError` for arguments that it does not take."""
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {cls.__name__}: {error}") from error
    return cls(**arguments)


def _load(path: Path) -> Any:
    if path.is_dir():
        path = path / "config.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no configuration file {path}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # a path with a zero byte: ValueError
        raise ValueError(f"the configuration file {path} cannot be read: {error}") from error


def _restored(name: str, value: Any) -> Any:
    """The value that `to_plain_value` wrote; a mark of an object stays."""
    if isinstance(value, list):
        items = [_restored(name, item) for item in value]
        if name in ("milestones", "columns", "background", "pixel_range") or (
            name == "transforms" and len(items) == 2
        ):
            return tuple(items)
        pairs = name == "layers" and all(isinstance(item, list) for item in items)
        return [tuple(item) for item in items] if pairs else items
    if not isinstance(value, Mapping):
        return value
    for kind, classes in _known_classes().items():
        if kind in value:
            known = {c.__name__: c for c in classes}
            if not isinstance(value[kind], str) or value[kind] not in known:
                raise ValueError(
                    f"{name}: unknown {kind} {value[kind]!r}; known: {', '.join(known)}"
                )
            own = {k: _tuples(_restored(k, v)) for k, v in value.items() if k != kind}
            return _called(known[value[kind]], own, name)
    return {key: _restored(key, item) for key, item in value.items()}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_no_marks(config: DistillConfig) -> None:
    """Check that every value of a configuration that was read is there.

    Raises:
        ValueError: If one was an object in the run that wrote the file.
    """
    for name, value in config.flat().items():
        if _is_mark(value) or (isinstance(value, list) and any(map(_is_mark, value))):
            mark = value if _is_mark(value) else next(filter(_is_mark, value))
            raise ValueError(
                f"{name} was an object in that run ({mark[OBJECT]}), which a file cannot hold: "
                "pass it beside the "
                f"configuration, distill(config=..., {name}=...)"
            )


def _is_mark(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {OBJECT}
