"""Adapter between every pair of layouts: shapes, identity, gradients."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.layout_conversion import as_map, as_shape, from_map
from kdtoolkit.types import Shape

SHAPES = {
    "NCHW": [Shape((6, 8, 8)), Shape((6, 4, 4)), Shape((10, 3, 5))],
    "NHWC": [Shape((8, 8, 6), "NHWC"), Shape((4, 2, 10), "NHWC")],
    "NLC": [Shape((16, 6)), Shape((17, 6), "NLC", (4, 4), 1), Shape((11, 10), "NLC", (3, 3), 2)],
    "NCL": [Shape((6, 16), "NCL"), Shape((10, 7), "NCL", (2, 3), 1)],
    "order": [
        Shape((6, 5), "NLC", (2, 3), 0, (4, 0, 5, 1, 3, 2)),
        Shape((7, 6), "NLC", (3, 2), 1, (1, 3, 5, 0, 2, 4)),
    ],
    "NC": [Shape((6,)), Shape((10,))],
}
EVERY = list(itertools.chain(*SHAPES.values()))
PAIRS = list(itertools.product(EVERY, EVERY))


def name(shape):
    return f"{shape.layout}{'x'.join(map(str, shape))}p{shape.prefix}"


def same(a, b):
    return (tuple(a), a.layout, a.prefix, a.order) == (tuple(b), b.layout, b.prefix, b.order)


@pytest.mark.parametrize("src, dst", PAIRS, ids=[f"{name(a)}-{name(b)}" for a, b in PAIRS])
def test_every_pair_of_layouts(src, dst):
    torch.manual_seed(0)
    adapter = Adapter(src, dst)
    feature = torch.randn(3, *src, requires_grad=True)
    out = adapter(feature)
    assert out.shape == (3, *dst)
    assert adapter.is_identity == same(src, dst)
    assert (out is feature) == same(src, dst)
    (out * torch.randn_like(out)).sum().backward()
    for parameter, p in adapter.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, parameter
    assert feature.grad.abs().sum() > 0
    made = dst.prefix and src.prefix != dst.prefix  # class tokens of its own making have an offset
    assert any(True for _ in adapter.parameters()) == bool(src.channels != dst.channels or made)


@pytest.mark.parametrize("shape", EVERY, ids=name)
def test_map_and_back(shape):
    feature = torch.randn(2, *shape)
    tokens = (
        (feature.mT if shape.layout == "NCL" else feature)[:, : shape.prefix]
        if shape.prefix
        else None
    )
    mapped = as_map(feature, shape)
    assert mapped.shape == (2, shape.channels, *shape.grid)
    assert torch.equal(from_map(mapped, shape, tokens), feature)


def test_tokens_lie_row_by_row():
    tokens = torch.arange(6.0).reshape(1, 6, 1)  # value = position
    grid = as_map(tokens, Shape((6, 1), "NLC", (2, 3)))
    assert grid[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_smaller_grids_are_means_and_larger_ones_keep_a_constant():
    feature = torch.randn(2, 4, 4, 4)
    small = Adapter((4, 4, 4), (4, 2, 2))(feature)
    torch.testing.assert_close(small[:, :, 0, 1], feature[:, :, :2, 2:].mean((2, 3)))
    torch.testing.assert_close(Adapter((4, 4, 4), (4,))(feature), feature.mean((2, 3)))
    assert torch.equal(
        Adapter((4, 2, 2), (4, 5, 5))(torch.ones(1, 4, 2, 2)), torch.ones(1, 4, 5, 5)
    )


def test_class_tokens():
    one, two = Shape((5, 4), "NLC", (2, 2), 1), Shape((6, 4), "NLC", (2, 2), 2)
    feature = torch.randn(3, *one)
    assert torch.equal(
        Adapter(one, Shape((2, 4), "NLC", (1, 1), 1))(feature)[:, 0], feature[:, 0]
    )  # its own
    made = Adapter(one, two)
    with torch.no_grad():
        made.token_offset[1] = 1.0  # the first class token of the source, and a learned offset
    torch.testing.assert_close(
        made(feature)[:, :2], torch.stack([feature[:, 0], feature[:, 0] + 1], 1)
    )
    none = Adapter(Shape((4, 4), "NLC", (2, 2)), two)(feature[:, 1:])[:, :2]
    torch.testing.assert_close(none, feature[:, 1:].mean(1, keepdim=True).expand(-1, 2, -1))


def test_tokens_in_an_order_of_their_own():
    order = (2, 0, 3, 1)  # the first position of the grid is token 2
    tokens = torch.arange(4.0).reshape(1, 4, 1)
    shape = Shape((4, 1), "NLC", (2, 2), 0, order)
    assert as_map(tokens, shape)[0, 0].tolist() == [[2, 0], [3, 1]]
    assert torch.equal(from_map(as_map(tokens, shape), shape), tokens)
    row_by_row = Adapter(shape, Shape((4, 1), "NLC", (2, 2)))
    assert not row_by_row.is_identity and row_by_row(tokens).flatten().tolist() == [2, 0, 3, 1]


def test_windows_in_the_batch():
    image = torch.arange(2 * 24.0).reshape(2, 1, 4, 6)
    shape = Shape((2, 1), "windows", (4, 6), windows=(4, 3))  # 12 windows of 1x2 positions
    windows = from_map(image, shape)
    assert windows.shape == (24, 2, 1) and windows[:4, :, 0].tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert torch.equal(as_map(windows, shape), image)
    made = Adapter((3, 8, 8), shape)
    assert made(torch.randn(2, 3, 8, 8)).shape == (24, 2, 1)


def test_resizing():
    feature = torch.randn(2, 4, 8, 6)
    pooled, smooth = (
        Adapter((4, 8, 6), (4, 5, 3), resize=r)(feature) for r in ("pool", "interpolate")
    )
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(feature, (5, 3)))
    torch.testing.assert_close(
        smooth, F.interpolate(feature, (5, 3), mode="bilinear", antialias=True)
    )
    mixed = Adapter((4, 8, 6), (4, 4, 12))(feature)  # shrinks one way and grows the other
    torch.testing.assert_close(
        mixed, F.interpolate(feature, (4, 12), mode="bilinear", antialias=True)
    )
    with pytest.raises(ValueError, match="resize is 'cubic'; allowed: 'pool', 'interpolate'"):
        Adapter((4, 8, 6), (4, 5, 3), resize="cubic")


def test_projection_keeps_the_scale():
    torch.manual_seed(0)
    feature = torch.randn(8, 6, 4, 4)
    out = Adapter((6, 4, 4), (24, 4, 4))(feature)
    torch.testing.assert_close(out.square().sum(1), feature.square().sum(1))
    assert isinstance(Adapter((6, 4, 4), (24, 4, 4)).proj, nn.Conv2d)


def test_shapes_travel():
    shape = Shape((4, 2, 10), "NHWC")
    for other in (copy.deepcopy(shape), pickle.loads(pickle.dumps(shape)), as_shape(shape)):
        assert (other, other.layout, other.grid, other.channels) == ((4, 2, 10), "NHWC", (4, 2), 10)
    assert (as_shape([7, 3]).layout, as_shape([7]).grid, as_shape((5, 2, 2)).channels) == (
        "NLC",
        (1, 1),
        5,
    )
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3, 4\) without batch: expected"):
        as_shape((1, 2, 3, 4))
