"""Modules that cannot be trained or teach, and copies of those that deepcopy refuses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from kdtoolkit.models.copying import copy_network
from kdtoolkit.models.loading import load_model
from kdtoolkit.models.module_checks import check_module


def small(last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return small(nn.Linear(4, 10))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return small(nn.Linear(4, 10))


def buffers_in_inference_mode() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.inference_mode():
        net[1].running_mean = torch.zeros(4)
    return net


def exported() -> nn.Module:
    program = torch.export.export(small(nn.Linear(4, 10)).eval(), (torch.rand(2, 3, 8, 8),))
    return program.module()


def around_an_exported_one() -> nn.Module:
    return nn.Sequential(exported(), nn.ReLU())


WRONG = {
    "lazy": (
        lambda: small(nn.LazyLinear(10)),
        ["lazy modules", "3.weight and 1 more", "run one forward first"],
    ),
    "lazy convolution": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), ["lazy", "0.weight"]),
    "meta": (on_meta, ["on the meta device", "0.weight and 3 more", "build it on the CPU"]),
    "inference": (made_in_inference_mode, ["torch.inference_mode()", "copy.deepcopy(net)"]),
    "inference of a buffer": (buffers_in_inference_mode, ["inference_mode", "1.running_mean"]),
    "exported": (exported, ["torch.export", "pass the nn.Module that was exported"]),
    "exported inside": (around_an_exported_one, ["torch.export"]),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_says_so(case, role):
    make, words = WRONG[case]
    with pytest.raises(ValueError, match=f"the {role} ") as caught:
        check_module(make(), role)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_the_advice_helps():
    lazy = small(nn.LazyLinear(10))
    lazy(torch.zeros(2, 3, 32, 32))
    check_module(lazy, "student")
    check_module(copy.deepcopy(made_in_inference_mode()), "student")


@pytest.mark.parametrize(
    "make",
    [
        lambda: small(nn.Linear(4, 10)),
        lambda: torch.fx.symbolic_trace(small(nn.Linear(4, 10))),
        lambda: small(nn.Linear(4, 10)).half().requires_grad_(False),
        nn.Identity,
    ],
    ids=["plain", "traced by fx", "frozen half", "no parameters"],
)
def test_what_can_be_used_passes(make):
    net = make()
    assert check_module(net, "teacher") is net


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_may_teach_and_cannot_be_trained():
    script = torch.jit.trace(small(nn.Linear(4, 10)).eval(), torch.rand(1, 3, 8, 8))
    assert check_module(script, "teacher") is script
    with pytest.raises(ValueError, match="the student is a TorchScript module.*logits"):
        check_module(script, "student")


def test_an_exported_program_and_a_class_are_no_models():
    program = torch.export.export(small(nn.Linear(4, 10)), (torch.rand(2, 3, 8, 8),))
    with pytest.raises(ValueError, match="the teacher comes from torch.export"):
        load_model(program, role="teacher")
    with pytest.raises(ValueError, match=r"student=.*Flatten\(\.\.\.\) in place of the class"):
        load_model(nn.Flatten, role="student")
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="student='.*is empty"):
            load_model(empty, role="student")


NORMS = ["weight_norm", "spectral_norm"]


@pytest.mark.parametrize("norm", NORMS)
def test_a_copy_of_a_network_with_computed_weights(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated, and used
        wrap = getattr(torch.nn.utils, norm)
        net = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.Flatten(), wrap(nn.Linear(144, 10)))
    x = torch.rand(2, 3, 8, 8)
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    new = copy_network(net)
    assert torch.allclose(new.eval()(x), net.eval()(x))
    own = {id(p) for p in net.parameters()}
    assert not own & {id(p) for p in new.parameters()}
    new.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in new.parameters())
