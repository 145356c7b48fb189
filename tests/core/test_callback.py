"""Order and names of callbacks, old names of their methods, and what they may use of a run."""

import inspect
import re
import warnings

import pytest

from kdtoolkit import callbacks
from kdtoolkit.core.callback import (
    RENAMED_EVENTS,
    Callback,
    check_several_networks,
    ordered_callbacks,
)
from kdtoolkit.core.method import Method
from kdtoolkit.core.run_context import RunContext, last_step_of_epoch
from kdtoolkit.types import Clock


class First(Callback):
    name = "first"
    order = 5


class Second(Callback):
    name = "second"


def test_callbacks_are_sorted_by_order_and_names_are_unique():
    method = Method()
    method.callbacks = (own := Second(),)
    first, unnamed = First(), Callback()
    assert ordered_callbacks(method, [unnamed, first]) == [first, own, unnamed]
    with pytest.raises(
        ValueError, match="two callbacks are named 'second': give one of them another"
    ):
        ordered_callbacks(method, [Second()])


def test_the_documented_orders_are_those_of_the_classes():
    table = dict(re.findall(r"\| (\d+) \| `(\w+)` \|", Callback.__doc__))
    assert table
    for order, name in table.items():
        assert getattr(callbacks, name).order == int(order)
    others = set(callbacks.__all__) - set(table.values()) - {"CollapseWarning"}
    assert {getattr(callbacks, name).order for name in others} == {100}


def test_every_event_stands_in_the_documented_loop():
    events = [name for name in vars(Callback) if name.startswith("on_")] + ["check"]
    loop = Callback.__doc__.split("```")[1]
    assert len(events) == 8
    assert all(f"{event}(" in loop for event in events)


@pytest.mark.parametrize("old, new", RENAMED_EVENTS.items())
def test_a_method_under_its_old_name_still_works_and_warns(old, new):
    result = object()
    with pytest.warns(
        DeprecationWarning, match=rf"Callback.{old} is named {new} now: rename Old.{old}"
    ):
        cls = type("Old", (Callback,), {old: lambda self: result})
    assert getattr(cls(), new)() is result


def test_an_attribute_or_a_method_beside_the_new_one_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls = type(
            "Own", (Callback,), {"notes": ["mine"], "plan": len, "plan_rows": lambda self: [1]}
        )
    assert cls().plan_notes() == []
    assert cls().plan_rows() == [1]


def test_arguments_are_remembered():
    assert callbacks.Checkpoints(3).init_arguments == ((3,), {})
    assert callbacks.Checkpoints(every=2).init_arguments == ((), {"every": 2})


def test_two_networks_are_needed():
    method = Method()
    method.networks = lambda: {"student": None}
    with pytest.raises(ValueError, match="Second needs two networks or more, this run trains 1"):
        check_several_networks(Second(), method)


def test_the_end_of_an_epoch():
    class Run:
        clock, epoch_start = Clock(steps_per_epoch=4, total_steps=10), 4

    assert last_step_of_epoch(Run) == 8
    Run.epoch_start = 8
    assert last_step_of_epoch(Run) == 10


@pytest.mark.parametrize("name", sorted(set(callbacks.__all__) - {"CollapseWarning"}))
def test_callbacks_use_only_what_a_run_context_has(name):
    source = inspect.getsource(inspect.getmodule(getattr(callbacks, name)))
    used = set(re.findall(r"\brun\.(\w+)", source))
    members = {*RunContext.__annotations__, *vars(RunContext), "add"}
    assert used <= members, used - members
    assert not re.findall(r"\brun\.[\w.]*\._\w+", source)
