"""States come back bit for bit, with their types, or are refused with the place in them."""

from __future__ import annotations

import collections
import datetime
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdtoolkit.utils.state_file import DamagedFile, read_state, write_state
from kdtoolkit.utils.state_tree import PackedState, UnsupportedState, pack_state, unpack_state

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
)  # fmt: skip


def through_a_file(state, tmp_path: Path):
    path = tmp_path / "state.safetensors"
    write_state(path, state)
    return read_state(path)


def bits(x: torch.Tensor) -> bytes:
    plain = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (3, 0, 2), (2, 3, 4, 5)], ids=str)
def test_tensors_of_every_dtype_and_shape(dtype, shape, tmp_path):
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    x = raw.view(dtype).reshape(shape)  # any bits, NaNs with a payload among them
    assert_same(through_a_file({"x": x}, tmp_path)["x"], x)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 3),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "slice": lambda x: x[:, 1:2],
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "parameter": nn.Parameter,
    "conjugate": lambda x: torch.complex(x, x).conj(),
    "negative": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_of_every_layout(name, tmp_path):
    x = LAYOUTS[name](torch.randn(2, 3, 4, 6))
    found = through_a_file({"x": x}, tmp_path)["x"]
    assert_same(found, x)
    if name in ("transposed", "channels_last"):
        assert found.stride() == x.stride()  # sums run in the same order


def test_tensors_that_share_memory(tmp_path):
    base = torch.arange(10.0)
    state = {"a": base, "b": base, "c": [base[:4], base[4:]], "d": base.view(2, 5), "a#2": base + 1}
    found = through_a_file(state, tmp_path)
    assert found["a"] is found["b"]  # tied, as before
    assert torch.equal(found["c"][0], base[:4]) and torch.equal(found["c"][1], base[4:])
    assert torch.equal(found["d"], base.view(2, 5)) and torch.equal(found["a#2"], base + 1)


def test_names_that_collide(tmp_path):
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    state = {"x/y": a, "x": {"y": b}, "__metadata__": c, "": torch.ones(4)}
    state |= {1: {"1": a}, "1": {1: b}}
    found = through_a_file(state, tmp_path)
    assert torch.equal(found["x/y"], a) and torch.equal(found["x"]["y"], b)
    assert torch.equal(found["__metadata__"], c) and len(found[""]) == 4
    assert torch.equal(found[1]["1"], a) and torch.equal(found["1"][1], b)


VALUES = (
    None, True, False, 0, -1, 2**70, 0.1, -0.0, 5e-324, 1e308, "", "ä\ud7ff\0", 1 + 2j, b"\0\xff",
    [], (), {}, set(), [1, [2, (3,)]], (1, (2,), [3]), {1, 2}, frozenset("a"), {"a": {"b": ()}},
    {1: "a", (1, 2): "b", None: "c", 2.5: "d"}, {"$": "tensor"}, {"$": {"$": 1}},
    collections.OrderedDict(b=1, a=2), collections.Counter("aab"), torch.Size([2, 3]),
    torch.bfloat16, torch.device("cuda", 1), Path("a/b"), np.float32(0.1), np.int64(-3),
    np.bool_(True), np.complex64(1j), np.str_("x"), np.datetime64("2020-01-01"),
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back_with_their_types(value, tmp_path):
    found = through_a_file({"x": value}, tmp_path)["x"]
    assert type(found) is type(value) and found == value and repr(found) == repr(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value, tmp_path):
    found = through_a_file([value, np.float32(value), torch.tensor(value)], tmp_path)
    assert [str(float(x)) for x in found] == [str(value)] * 3


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 2), np.uint16), np.array(3),
     np.array(["a", "bc"]), np.arange(3, dtype=">i4"), np.array([True]),
     np.array(["2020-01-01"], "datetime64[D]")],
    ids=lambda a: str(a.dtype),
)  # fmt: skip
def test_arrays(array, tmp_path):
    found = through_a_file({"x": array}, tmp_path)["x"]
    assert type(found) is np.ndarray and found.dtype == array.dtype and found.shape == array.shape
    assert np.array_equal(found, array)
    if found.size:
        found[...] = found  # writable, as the array was


class Odd:
    def __repr__(self) -> str:
        return "Odd()"


class Pair(collections.namedtuple("Pair", "a b")):
    pass


REFUSED = (
    (Odd(), "an object of type Odd (Odd())"),
    (Odd, "an object of type type"),
    (len, "builtin_function_or_method"),
    (Pair(1, 2), "an object of type Pair"),
    (collections.defaultdict(int), "defaultdict"),
    (collections.deque([1]), "deque"),
    (datetime.date(2020, 1, 1), "an object of type date"),
    (iter([1]), "list_iterator"),
    (np.array([Odd()]), "a NumPy array of dtype object"),
    (np.zeros(1, [("a", "i4")]), "a NumPy array of dtype [('a', '<i4')]"),
    (torch.eye(2).to_sparse(), "torch.sparse_coo"),
    (torch.empty(2, device="meta"), "on meta"),
    (torch.Generator(), "Generator"),
)


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=lambda x: str(x)[:20])
def test_what_cannot_be_saved_is_refused_with_its_place(value, message):
    with pytest.raises(UnsupportedState) as error:
        pack_state({"good": 1, "outer": [{"inner": value}]})
    assert "['outer']['0']['inner']" in str(error.value) and message in str(error.value)
    assert "Allowed are plain values, tensors, NumPy arrays" in str(error.value)


WRONG = (
    {"$": "tensor", "name": "missing"}, {"$": "tensor"}, {"$": "no kind", "value": 1},
    {"$": "tensor", "name": "x", "dtype": "torch.load", "shape": [1]}, {"$": ["x"]},
    {"$": "tensor", "name": "x", "dtype": "torch.float32", "shape": [7]}, {"$": "dict", "items": 3},
    {"$": "tensor", "name": "x", "order": [5, 6]}, {"$": "array", "name": "x", "dtype": "O"},
    {"$": "array", "name": "x", "dtype": "f4", "shape": [9]}, {"$": "float", "value": "x"},
    {"$": "set", "items": [[]]}, {"$": "bytes", "value": "?"}, {"$": "dtype", "value": "os"},
)  # fmt: skip


@pytest.mark.parametrize("plain", WRONG, ids=str)
def test_a_made_up_structure_is_a_value_error(plain):
    with pytest.raises(ValueError):
        unpack_state(PackedState(plain, {"x": torch.zeros(8, dtype=torch.uint8)}))


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 9, b"\2\0\0\0\0\0\0\0{}" * 2, b"[" * 999])
def test_a_file_of_something_else(content, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"state\.safetensors is damaged"):
        read_state(path)


def test_a_deep_structure_is_damage_and_no_crash(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    save_file({}, path, metadata={"state": "[" * 200_000 + "]" * 200_000})
    with pytest.raises(DamagedFile):
        read_state(path)


def test_tensors_of_another_program(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DamagedFile, match="'state' is missing"):
        read_state(path)
