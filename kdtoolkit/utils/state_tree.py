"""States as plain JSON and named tensors, and back: what a checkpoint can hold.

A state is nested: dicts, lists, tuples, sets; plain values; tensors; NumPy arrays and scalars;
paths; torch's sizes, dtypes and devices. Everything comes back with the type that it had, except
that subclasses of str, int, float and tensors come back as the plain type, and tensors on the CPU.
Anything else is an `UnsupportedState`. Values become JSON; what JSON does not know is an object
with the key "$", its kind. Tensors go into a dict by name, those that share memory once.
"""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

KIND = "$"
# dtypes that every version of safetensors knows; others are written as their bytes
PLAIN_DTYPES = frozenset(
    (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
)  # fmt: skip
DTYPES = {str(found): found for found in vars(torch).values() if isinstance(found, torch.dtype)}
ARRAY_KINDS = "biufcSUMm"  # NumPy dtypes that hold no Python objects
CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}
CONTAINER_KINDS: dict[type, str] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    torch.Size: "size",
}
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "ordered": collections.OrderedDict,
    "counter": lambda pairs: collections.Counter(dict(pairs)),
}
MAPPING_KINDS: dict[type, str] = {
    dict: "dict",
    collections.OrderedDict: "ordered",
    collections.Counter: "counter",
}


class UnsupportedState(ValueError):
    """A state holds what a checkpoint cannot save."""


class PackedState(NamedTuple):
    """A state in two parts.

    Attributes:
        plain: Its structure and plain values, as JSON has them.
        tensors: Its tensors by name, contiguous, on the CPU.
    """

    plain: Any
    tensors: dict[str, Tensor]


def pack_state(state: object) -> PackedState:
    """Split a state into JSON and tensors.

    Args:
        state: The state, see the module.

    Raises:
        UnsupportedState: If it holds something else; the message says where, and what.
    """
    packer = _Packer()
    return PackedState(packer.pack(state, ()), packer.tensors)


def unpack_state(packed: PackedState) -> Any:
    """Put a state together again.

    Args:
        packed: What `pack_state` returned.

    Returns:
        The state, with the types that it had.

    Raises:
        ValueError: If `packed` was not made by `pack_state`.
    """
    try:
        return _Unpacker(packed.tensors).unpack(packed.plain, ())
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no state of this package: {type(error).__name__}: {error}") from error


class _Packer:
    """Packs one state."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}  # where a tensor lies in memory -> its name
        self._storages: set[int] = set()  # where the memory of `tensors` begins
        self._kept: list[Tensor] = []  # so that no address is used twice

    def pack(self, value: Any, path: tuple[str, ...]) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, Tensor):
            return self._pack_tensor(value, path)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._pack_array(value, path)
        if type(value) in MAPPING_KINDS:
            return self._pack_mapping(value, path)
        if type(value) is list:
            return [self.pack(item, (*path, str(i))) for i, item in enumerate(value)]
        if type(value) in CONTAINER_KINDS:
            items = [self.pack(item, (*path, str(i))) for i, item in enumerate(value)]
            return {KIND: CONTAINER_KINDS[type(value)], "items": items}
        return _pack_plain(value, path)

    def _pack_mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        kind = MAPPING_KINDS[type(value)]
        if kind == "dict" and KIND not in value and all(type(key) is str for key in value):
            return {key: self.pack(item, (*path, key)) for key, item in value.items()}
        pairs = [
            [self.pack(key, (*path, "key")), self.pack(item, (*path, str(key)))]
            for key, item in value.items()
        ]
        return {KIND: kind, "items": pairs}

    def _pack_tensor(self, value: Tensor, path: tuple[str, ...]) -> Any:
        _check_tensor(value, path)
        tensor = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        place = _place_in_memory(tensor)
        entry: dict[str, Any] = {KIND: "tensor"}
        order = _memory_order(tensor)
        if order is not None:
            entry["order"] = order
        if tensor.dtype not in PLAIN_DTYPES:
            entry |= {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        if place not in self._names:
            self._names[place] = name = self._free_name(path)
            self.tensors[name] = self._own_memory(_as_written(tensor, order))
            self._kept.append(tensor)
        return entry | {"name": self._names[place]}

    def _pack_array(self, value: np.ndarray | np.generic, path: tuple[str, ...]) -> Any:
        array = np.asarray(value)
        if array.dtype.kind not in ARRAY_KINDS:
            raise _refused(value, path, f"a NumPy array of dtype {array.dtype}")
        name = self._free_name(path)
        raw = np.frombuffer(bytearray(array.tobytes()), dtype=np.uint8)
        self.tensors[name] = torch.from_numpy(raw) if raw.size else torch.empty(0).byte()
        kind = "scalar" if isinstance(value, np.generic) else "array"
        return {KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "name": name}

    def _own_memory(self, tensor: Tensor) -> Tensor:
        """The tensor, copied where it shares memory: safetensors refuses such tensors."""
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in self._storages:
            tensor = tensor.clone()
        self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _free_name(self, path: tuple[str, ...]) -> str:
        name = wanted = "/".join(path) or "state"
        number = 1
        while name in self.tensors or name == "__metadata__":
            number += 1
            name = f"{wanted}#{number}"
        return name


def _pack_plain(value: Any, path: tuple[str, ...]) -> Any:
    """Values without tensors that JSON does not know."""
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {KIND: "float", "value": repr(number)}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {KIND: "complex", "value": [repr(value.real), repr(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {KIND: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, PurePath):
        return {KIND: "path", "value": str(value)}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "value": str(value)}
    if isinstance(value, torch.device):
        return {KIND: "device", "value": str(value)}
    raise _refused(value, path, f"an object of type {type(value).__name__}")


def _refused(value: object, path: tuple[str, ...], what: str) -> UnsupportedState:
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    where = "".join(f"[{key!r}]" for key in path) or "the state itself"
    return UnsupportedState(
        f"{where} is {what} ({shown}), which a checkpoint cannot hold. Allowed are plain values, "
        "tensors, NumPy arrays and scalars, paths, and dicts, lists, tuples and sets of these"
    )


def _check_tensor(value: Tensor, path: tuple[str, ...]) -> None:
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        what = f"a tensor of layout {value.layout} on {value.device}"
        raise _refused(tuple(value.shape), path, what)


def _place_in_memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same values in the same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    address = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*address, tuple(tensor.shape), tuple(tensor.stride()))


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory; None where they are in order."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return None
    strides, sizes = tuple(tensor.stride()), tuple(tensor.shape)
    order = sorted(range(len(sizes)), key=lambda d: (-strides[d], -sizes[d]))
    return order if tensor.permute(order).is_contiguous() else None


def _as_written(tensor: Tensor, order: list[int] | None) -> Tensor:
    """The tensor as it lies in memory, on the CPU."""
    plain = tensor if order is None else tensor.permute(order)
    plain = plain.to("cpu").contiguous()
    return plain if plain.dtype in PLAIN_DTYPES else plain.reshape(-1).view(torch.uint8)


class _Unpacker:
    """Unpacks one state."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._unpacked: dict[str, Tensor] = {}

    def unpack(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self.unpack(item, path) for item in value]
        if not isinstance(value, dict):
            return value
        if KIND not in value:
            return {key: self.unpack(item, path) for key, item in value.items()}
        kind = value[KIND]
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.unpack(item, path) for item in value["items"])
        if kind in MAPPINGS:
            pairs = [(self.unpack(k, path), self.unpack(v, path)) for k, v in value["items"]]
            return MAPPINGS[kind](pairs)
        if kind == "tensor":
            return self._unpack_tensor(value)
        if kind in ("array", "scalar"):
            return self._unpack_array(value)
        return _unpack_plain(kind, value["value"])

    def _unpack_tensor(self, value: Mapping[str, Any]) -> Tensor:
        name = value["name"]
        if name not in self._unpacked:
            self._unpacked[name] = self._read_tensor(value)
        return self._unpacked[name]

    def _read_tensor(self, value: Mapping[str, Any]) -> Tensor:
        tensor, order = self.tensors[value["name"]], value.get("order")
        if "dtype" in value:
            shape = value["shape"]
            stored = shape if order is None else [shape[d] for d in order]
            tensor = tensor.view(_torch_dtype(value["dtype"])).reshape(stored)
        if order is None:
            return tensor
        return tensor.permute([order.index(d) for d in range(len(order))])

    def _unpack_array(self, value: Mapping[str, Any]) -> np.ndarray | np.generic:
        dtype = np.dtype(str(value["dtype"]))
        if dtype.kind not in ARRAY_KINDS:
            raise ValueError(f"no dtype of a state: {dtype}")
        raw = self.tensors[value["name"]].numpy().tobytes()
        array = np.frombuffer(bytearray(raw), dtype=dtype).reshape(value["shape"])
        found: np.ndarray | np.generic = array if value[KIND] == "array" else array[()]
        return found


def _unpack_plain(kind: str, value: Any) -> Any:
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(float(value[0]), float(value[1]))
    if kind == "bytes":
        return base64.b64decode(value, validate=True)
    if kind == "path":
        return Path(value)
    if kind == "dtype":
        return _torch_dtype(value)
    if kind == "device":
        return torch.device(value)
    raise ValueError(f"no kind of value of a state: {kind!r}")


def _torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{name!r} is no dtype of torch")
    return DTYPES[name]
