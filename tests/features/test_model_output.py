"""Logits in output objects, dicts and named tuples."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kdtoolkit import distill
from kdtoolkit.data import Data, load
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.model_output import take_logits
from kdtoolkit.models.head import classifier_names, num_outputs


@dataclass
class Output:
    """As transformers writes them."""

    logits: Tensor
    hidden_states: Any = None


class Named(NamedTuple):
    aux: Tensor
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor):
        self.logits = logits


KINDS = {
    "dataclass": lambda y, x: Output(y, (x,)),
    "object": lambda y, x: Plain(y),
    "named tuple": lambda y, x: Named(x, y),
    "dict": lambda y, x: {"loss": None, "logits": y, "features": x},
    "ordered": lambda y, x: collections.OrderedDict(features=x, logits=y),
}


class Net(nn.Module):
    """(B, 3, H, W) to an output with (B, classes)."""

    def __init__(self, wrap, classes: int = 10):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.fc, self.wrap = nn.Linear(8, classes), wrap

    def forward(self, x: Tensor) -> Any:
        x = self.two(self.one(x).relu()).relu()
        return self.wrap(self.fc(x.mean((2, 3))), x)


def alone(logits: Tensor, _: Tensor) -> Tensor:
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_taps_read_logits_and_features(kind):
    torch.manual_seed(0)
    net, plain = Net(KINDS[kind]), Net(alone)
    plain.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 16, 16)
    taps = Taps(net, ["one"], 16)
    out, expected = taps(x), Taps(plain, ["one"], 16)(x)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.feats["one"], expected.feats["one"])
    assert num_outputs(taps) == 10 and classifier_names(taps) == ["fc"]
    frozen = Frozen(net, ["two"], 16)
    assert torch.equal(frozen.forward_from(x, "two", frozen(x).feats["two"]).logits, out.logits)
    assert frozen.find_reset_errors(["two"]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_they_teach_and_learn(kind):
    torch.manual_seed(0)
    run = dict(
        max_steps=1, batch_size=32, train_limit=64, progress="off", num_workers=0,
        allow_weak_teacher=True, layers=[("two", "two")], losses={"ce": 1.0, "kd": 1.0, "at": 1.0},
    )  # fmt: skip
    result = distill(Net(KINDS[kind]), Net(KINDS[kind]), "digits", method="at", **run)
    assert result.metrics["top1"] >= 0 and result.metrics["teacher_top1"] >= 0
    assert result.metrics["macs"] > 0


@pytest.fixture(scope="module")
def few() -> Data:
    data = load("digits", train_limit=64, validation=10)
    return Data(**{**vars(data), "test": None})


STAGES = {"layers": [("one", "one"), ("two", "two")]}
METHODS = {"srkd": STAGES, "sokd": {}, "dml": {}, "one": {}, "dkel": {}, "byot": {}, "bake": {}}


@pytest.mark.parametrize("method", METHODS)
def test_in_methods_that_run_parts_of_a_network(method, few):
    teacher = Net(KINDS["dict"]) if method in ("srkd", "sokd") else None
    run = dict(max_steps=1, batch_size=32, progress="off", num_workers=0, allow_weak_teacher=True)
    result = distill(
        teacher, Net(KINDS["dict"]), few, method=method, **run, **METHODS[method]
    )  # fmt: skip
    assert result.metrics["top1"] >= 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, x: (y, x),
        lambda y, x: [y],
        lambda y, x: {"out": y},
        lambda y, x: {"logits": [y]},
        lambda y, x: Output((y, x)),
        lambda y, x: x,
    ],
    ids=["tuple", "list", "other key", "list of logits", "tuple of logits", "map"],
)
def test_what_has_no_logits_says_where_they_are_looked_for(wrap):
    with pytest.raises(ValueError, match="logits must be one tensor .*under the name 'logits'"):
        num_outputs(Taps(Net(wrap), None, 16))


def test_a_tensor_is_itself():
    x = torch.rand(2)
    assert take_logits(x) is x
    assert take_logits({"logits": 3}) == {"logits": 3} and take_logits(None) is None
