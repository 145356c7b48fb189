"""Losses in a training loop of one's own, and their options."""

import inspect
import re

import pytest
import timm
import torch

import kdtoolkit.models  # noqa: F401
from kdtoolkit import functional
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses import AT, KD, CrossEntropy, FitNet
from kdtoolkit.losses.fitnet import Regressor, choose_hint
from kdtoolkit.types import Shape
from kdtoolkit.utils.registry import keyword_options

SIZE = 16
PAIRS = [(1, 1), (2, 2), (3, 3)]


@pytest.fixture
def tapped():
    """Student and teacher with every stage tapped."""
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(name, num_classes=10) for name in ("cifar_resnet8", "cifar_resnet14")
    )
    return Taps(student, [1, 2, 3], SIZE), Frozen(teacher, [1, 2, 3], SIZE)


def build_batch():
    torch.manual_seed(1)
    return {"x": torch.rand(4, 3, SIZE, SIZE), "y": torch.arange(4), "index": torch.arange(4)}


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_in_a_loop_of_ones_own(name, tapped):
    student, teacher = tapped
    loss = LOSSES[name](student, teacher, PAIRS)
    batch = build_batch()
    student_out, teacher_out = student(batch["x"]), teacher(batch["x"])
    value = loss(student_out, teacher_out, batch)
    assert value.shape == ()
    assert value.dtype == torch.float32
    value.backward()
    parameters = [*student.model.parameters(), *loss.parameters()]
    assert any(p.grad is not None and p.grad.any() for p in parameters)
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_is_described(name):
    cls = LOSSES[name]
    module = inspect.getmodule(cls).__doc__
    assert re.search(r"\n\nLoss: .+\n\nDiffers: ", module, re.DOTALL)
    arguments = inspect.getdoc(cls).partition("Args:")[2]
    for option in keyword_options(cls.__init__):
        assert f"\n    {option}: " in arguments, option


def test_losses_are_those_of_functional(tapped):
    student, teacher = tapped
    batch = build_batch()
    s, t = student(batch["x"]), teacher(batch["x"])
    kd = KD(student, teacher, temperature=2.0)(s, t, batch)
    assert torch.equal(kd, functional.kd(s.logits, t.logits, temperature=2.0))
    features = [[out.feats[stage] for stage in (1, 3)] for out in (s, t)]
    at = AT(student, teacher, [(1, 1), (3, 3)], p=3)(s, t, batch)
    assert torch.equal(at, functional.at(*features, p=3))
    ce = CrossEntropy(student, label_smoothing=0.1)(s, s, batch)
    assert torch.equal(ce, functional.ce(s.logits, batch["y"], label_smoothing=0.1))


def test_a_loss_on_features_needs_pairs(tapped):
    with pytest.raises(ValueError, match="AT compares features: give pairs of taps"):
        AT(*tapped)


@pytest.mark.parametrize(
    "which, chosen", [("all", PAIRS), ("middle", [(2, 2)]), (1, [(1, 1)]), (-1, [(3, 3)])]
)
def test_hints(which, chosen):
    assert choose_hint(PAIRS, which) == chosen


def test_hint_of_no_pairs():
    assert choose_hint([], "middle") == []
    with pytest.raises(ValueError, match="hint is 0; allowed: a pair of stages from 1 to 3"):
        choose_hint(PAIRS, 0)


@pytest.mark.parametrize("src, dst, kernel", [
    ((8, 16, 16), (4, 8, 8), (3, 3)),
    ((8, 8, 8), (4, 16, 16), (4, 4)),
    ((8, 8, 8), (4, 8, 8), (1, 1)),
    ((8, 10, 9), (4, 8, 8), (3, 2)),
])  # fmt: skip
def test_regressor_takes_one_grid_to_another(src, dst, kernel):
    assert Regressor.fits(Shape(src), Shape(dst))
    regressor = Regressor(Shape(src), Shape(dst))
    assert regressor.conv.kernel_size == kernel
    assert regressor(torch.rand(2, *src)).shape == (2, *dst)


def test_regressor_fits_no_larger_grid_and_no_tokens(tapped):
    assert not Regressor.fits(Shape((8, 8, 8)), Shape((4, 12, 12)))
    assert not Regressor.fits(Shape((8, 32, 32)), Shape((4, 4, 4)))  # a kernel of 29
    assert not Regressor.fits(Shape((64, 8)), Shape((8, 8, 8)))
    assert len(FitNet(*tapped, PAIRS, hint="all").adapters) == 3
