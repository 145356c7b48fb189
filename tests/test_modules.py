"""Adapter between every pair of layouts: shapes, identity, gradients."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from kdtoolkit.modules import Adapter, as_map, as_shape, from_map
from kdtoolkit.types import Shape

SHAPES = {
    "NCHW": [Shape((6, 8, 8)), Shape((6, 4, 4)), Shape((10, 3, 5))],
    "NHWC": [Shape((8, 8, 6), "NHWC"), Shape((4, 2, 10), "NHWC")],
    "NLC": [Shape((16, 6)), Shape((17, 6), "NLC", (4, 4), 1), Shape((11, 10), "NLC", (3, 3), 2)],
    "NC": [Shape((6,)), Shape((10,))],
}
EVERY = list(itertools.chain(*SHAPES.values()))
PAIRS = list(itertools.product(EVERY, EVERY))


def name(shape):
    return f"{shape.layout}{'x'.join(map(str, shape))}p{shape.prefix}"


def same(a, b):
    return (tuple(a), a.layout, a.prefix) == (tuple(b), b.layout, b.prefix)


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
    assert any(True for _ in adapter.parameters()) == (src.channels != dst.channels)


@pytest.mark.parametrize("shape", EVERY, ids=name)
def test_map_and_back(shape):
    feature = torch.randn(2, *shape)
    tokens = feature[:, : shape.prefix] if shape.prefix else None
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
    assert torch.equal(Adapter((4, 2, 2), (4, 5, 5))(torch.ones(1, 4, 2, 2)), torch.ones(1, 4, 5, 5))


def test_class_tokens():
    one, two = Shape((5, 4), "NLC", (2, 2), 1), Shape((6, 4), "NLC", (2, 2), 2)
    feature = torch.randn(3, *one)
    assert torch.equal(Adapter(one, Shape((2, 4), "NLC", (1, 1), 1))(feature)[:, 0], feature[:, 0])  # its own
    mean = Adapter(one, two)(feature)[:, :2]
    torch.testing.assert_close(mean, feature[:, 1:].mean(1, keepdim=True).expand(-1, 2, -1))


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
    assert (as_shape([7, 3]).layout, as_shape([7]).grid, as_shape((5, 2, 2)).channels) == ("NLC", (1, 1), 5)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3, 4\) without batch: expected"):
        as_shape((1, 2, 3, 4))
