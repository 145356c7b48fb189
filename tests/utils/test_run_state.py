"""Models, optimizers, schedules and random numbers come back from a checkpoint bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdtoolkit.utils.checkpoint import CheckpointError
from kdtoolkit.utils.checkpoint_store import load, save
from kdtoolkit.utils.state import preserve_accelerate_state


class Loop:
    """A training loop without a state of its own."""

    def __init__(self) -> None:
        self.loaded = None

    def state_dict(self):
        return {"step": 3, "callbacks": {}}

    def load_state_dict(self, state) -> None:
        self.loaded = state


class Nested(torch.optim.Optimizer):
    """Keeps what torch would cast: other dtypes, nested containers, a count as an integer."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                kept["count"] = kept.get("count", torch.tensor(0, dtype=torch.int64)) + 1
                kept["mask"] = p.grad > 0
                kept["nested"] = {"exact": [p.double() * 0.1, (p.half(), "text", None)]}
                kept["twice"] = kept["nested"]["exact"][0]
                p -= group["lr"] * p.grad


def small(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(2, 3, 6, 6))
    return net.to(dtype)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(108, 108), nn.Linear(108, 108)
        self.two.weight = self.one.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        return self.two(self.one(x.flatten(1)).relu())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adam, lr as a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "two groups": lambda p: torch.optim.RMSprop(
        [{"params": p[:1], "lr": 0.1, "own": (1, "a")}, {"params": p[1:]}], momentum=0.5
    ),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "timm's lamb": lambda p: timm.optim.create_optimizer_v2(p, "lamb", lr=0.01),
    "timm's adafactor": lambda p: timm.optim.create_optimizer_v2(p, "adafactor", lr=0.01),
    "nested": Nested,
}
MODELS = {
    "float32": small,
    "bfloat16": lambda: small(torch.bfloat16),
    "channels_last": lambda: small().to(memory_format=torch.channels_last),
    "tied": Tied,
}


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    with preserve_accelerate_state(None):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        yield Accelerator(cpu=True)


def make(accelerator, model: nn.Module, make_optimizer):
    """A prepared model with its optimizer and schedule."""
    accelerator._models, accelerator._optimizers, accelerator._schedulers = [], [], []
    optimizer = make_optimizer(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
    return accelerator.prepare(model, optimizer, scheduler)


def train(model, optimizer, scheduler, steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6).to(dtype) * float(np.random.rand()) * random.random()
        model(x).float().square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def flat(value, path=""):
    """(path, leaf) of a nested state."""
    if isinstance(value, dict):
        return [leaf for key, v in value.items() for leaf in flat(v, f"{path}/{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for key, v in enumerate(value) for leaf in flat(v, f"{path}/{key}")]
    return [(path, value)]


def assert_same(a, b) -> None:
    for (name, x), (other, y) in zip(flat(a), flat(b), strict=True):
        assert name == other and type(x) is type(y), (name, other)
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y), name
        else:
            assert x == y, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(model, optimizer, accelerator, tmp_path):
    first = make(accelerator, MODELS[model](), OPTIMIZERS[optimizer])
    train(*first, steps=2)
    save(accelerator, tmp_path / "last", {"step": 2}, Loop())
    saved = [part.state_dict() for part in first]
    random_numbers = (random.random(), np.random.rand(), torch.rand(2))
    train(*first, steps=2)
    second, loop = make(accelerator, MODELS[model](), OPTIMIZERS[optimizer]), Loop()
    load(accelerator, tmp_path / "last", loop)
    assert loop.loaded == {"step": 3, "callbacks": {}}
    assert random_numbers[:2] == (random.random(), np.random.rand())
    assert torch.equal(random_numbers[2], torch.rand(2))
    assert saved[0].keys() == second[0].state_dict().keys()
    train(*second, steps=2)
    for before, after in zip(first, second, strict=True):
        assert_same(before.state_dict(), after.state_dict())


def test_wrapped_models_have_the_names_of_bare_ones(accelerator, tmp_path):
    """A checkpoint does not depend on distributed training or compilation."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        bare = make(accelerator, small(), torch.optim.AdamW)
        train(*bare, steps=1)
        accelerator._models[:] = [DistributedDataParallel(accelerator._models[0])]
        save(accelerator, tmp_path / "ddp", {"step": 1}, Loop())
    finally:
        torch.distributed.destroy_process_group()
    accelerator._models[:] = [torch.compile(bare[0])]
    save(accelerator, tmp_path / "compiled", {"step": 1}, Loop())
    for folder in ("ddp", "compiled"):
        again = make(accelerator, small(), torch.optim.AdamW)
        load(accelerator, tmp_path / folder, Loop())
        assert_same(bare[0].state_dict(), again[0].state_dict())
        assert_same(bare[1].state_dict(), again[1].state_dict())


class Scaler:
    """As torch.amp.GradScaler, which needs a GPU."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale, "growth_tracker": 3, "nan": float("inf")}

    def load_state_dict(self, state) -> None:
        self.scale, self.loaded = state["scale"], state


def test_the_scaler_of_gradients_comes_back(accelerator, tmp_path):
    make(accelerator, small(), torch.optim.AdamW)
    accelerator.scaler = Scaler(65536.0)
    save(accelerator, tmp_path / "last", {"step": 1}, Loop())
    accelerator.scaler = Scaler(1.0)
    load(accelerator, tmp_path / "last", Loop())
    assert accelerator.scaler.loaded == Scaler(65536.0).state_dict()


OTHERS = {
    "another model": (Tied, OPTIMIZERS["sgd"]),
    "another optimizer": (small, lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:]}])),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_that_does_not_fit_is_told(other, accelerator, tmp_path):
    make(accelerator, small(), OPTIMIZERS["sgd"])
    save(accelerator, tmp_path / "last", {"step": 1}, Loop())
    make(accelerator, *(part() if i == 0 else part for i, part in enumerate(OTHERS[other])))
    with pytest.raises(CheckpointError, match="last cannot be loaded"):
        load(accelerator, tmp_path / "last", Loop())


def test_a_state_that_cannot_be_saved_leaves_the_earlier_checkpoint(accelerator, tmp_path: Path):
    make(accelerator, small(), OPTIMIZERS["sgd"])
    save(accelerator, tmp_path / "last", {"step": 1, "epoch": 1}, Loop())
    accelerator._optimizers[0].param_groups[0]["own"] = object()
    with pytest.raises(CheckpointError, match=r"\['own'\] is an object of type object") as error:
        save(accelerator, tmp_path / "last", {"step": 2, "epoch": 2}, Loop())
    assert "last is whole (epoch 1, step 1)" in str(error.value)
