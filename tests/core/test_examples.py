"""The examples in docstrings of core, losses and callbacks run."""

import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import kdtoolkit
from kdtoolkit import callbacks, core, losses
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.registries import LOSSES, METHODS

FENCE = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SMALL = {"train_limit": 64, "batch_size": 32, "progress": "off", "num_workers": 0}
SMALL["allow_weak_teacher"] = True


def find_examples():
    for package in (core, losses, callbacks):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, item in vars(module).items():
                if getattr(item, "__module__", None) != info.name:
                    continue
                for _, code in FENCE.findall(inspect.getdoc(item) or ""):
                    yield pytest.param(textwrap.dedent(code), id=f"{info.name}.{name}")


EXAMPLES = [p for p in find_examples() if "import" in p.values[0]]  # the loop of Callback is none


def test_examples_are_found():
    names = {p.id.rpartition(".")[2] for p in EXAMPLES}
    assert {"DistillationLoss", "Callback", "Method", "register_loss", "register_strategy"} <= names
    assert "on_epoch_end" in Callback.__doc__


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, monkeypatch):
    run = kdtoolkit.distill
    monkeypatch.setattr(
        kdtoolkit, "distill", lambda *args, **given: run(*args, **{**SMALL, **given})
    )
    kept = [(registry, dict(registry._items)) for registry in (LOSSES, METHODS)]
    try:
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    finally:
        for registry, items in kept:
            registry._items.clear()
            registry._items.update(items)
