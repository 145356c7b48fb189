"""Checks of options: what is accepted, and messages with what was given and allowed."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from kdtoolkit.utils import validation as v


@pytest.mark.parametrize("value, allowed", [
    ("mean", ("mean", "sum")), (True, (True, False)), (None, ("a", None)), (2, [1, 2]),
])  # fmt: skip
def test_a_choice_is_accepted(value, allowed):
    v.check_choice("rule", value, allowed)


@pytest.mark.parametrize("value", ["median", 1, 0, None, np.array([1, 2]), ["mean"]])
def test_another_choice_is_refused(value):
    with pytest.raises(ValueError, match=r"rule is .*; allowed: 'mean', True, False$"):
        v.check_choice("rule", value, (name for name in ("mean", True, False)))


@pytest.mark.parametrize("value", [0, 3, 2.5, -1e30, np.float32(0.5), np.int64(4), Fraction(1, 3)])
def test_a_number_is_accepted(value):
    v.check_number("p", value)


NO_NUMBERS = ["1", None, True, np.True_, torch.tensor(1.0), [1], 1j]


@pytest.mark.parametrize("value", [*NO_NUMBERS, float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="p is .*; allowed: a finite number$"):
        v.check_number("p", value)


@pytest.mark.parametrize("bounds, inside, outside, words", [
    ({"minimum": 0, "maximum": 1}, (0, 1, 0.5), (-1e-9, 1.1), "from 0 up to 1"),
    ({"above": 0, "below": 1}, (0.5, 1e-9), (0, 1, -2), "above 0 below 1"),
    ({"minimum": 0.25, "below": 2}, (0.25, 1.9), (0.2, 2), "from 0.25 below 2"),
])  # fmt: skip
def test_bounds(bounds, inside, outside, words):
    for value in inside:
        v.check_number("p", value, **bounds)
    for value in outside:
        with pytest.raises(ValueError, match=f"p is {value}; allowed: a finite number {words}$"):
            v.check_number("p", value, **bounds)


def test_the_meaning_ends_the_message():
    with pytest.raises(ValueError, match=r"a finite number above 0 \(epochs\)$"):
        v.check_positive("length", 0, "epochs")
    with pytest.raises(ValueError, match=r"a whole number from 1 \(epochs\)$"):
        v.check_whole_number("every", 0, meaning="epochs")


@pytest.mark.parametrize("check, accepted, refused", [
    (v.check_positive, (1e-9, 5), (0, -1)),
    (v.check_non_negative, (0, 5), (-1e-9, -1)),
    (v.check_fraction, (0, 1, 0.3), (-0.1, 1.1)),
])  # fmt: skip
def test_ranges_with_a_name(check, accepted, refused):
    for value in accepted:
        check("p", value)
    for value in (*refused, *NO_NUMBERS):
        with pytest.raises(ValueError, match="p is .*; allowed: a finite number"):
            check("p", value)


def test_whole_numbers():
    for value in (1, 7, np.int64(3)):
        v.check_whole_number("every", value)
    v.check_whole_number("k", -3, minimum=-3)
    for value in (0, -1, 1.0, *NO_NUMBERS):
        with pytest.raises(ValueError, match="every is .*; allowed: a whole number from 1$"):
            v.check_whole_number("every", value)


def test_numbers_that_nothing_can_hold():
    with pytest.raises(ValueError, match="p is 1000.* ... .*000; allowed: a finite number$"):
        v.check_number("p", 10**400)
    with pytest.raises(ValueError, match="every is 9223372036854775808; .* up to 922337203"):
        v.check_whole_number("every", 2**63)
    with pytest.raises(ValueError, match="seed is 11; allowed: a whole number from 0 up to 10$"):
        v.check_whole_number("seed", 11, minimum=0, maximum=10)


def test_flags():
    for value in (True, False, np.True_):
        v.check_flag("views", value)
    for value in (0, 1, "no", None, np.array([True, False])):
        with pytest.raises(ValueError, match="views is .*; allowed: True, False$"):
            v.check_flag("views", value)


@pytest.mark.parametrize("value, plain", [
    (np.float32(0.5), 0.5), (np.int64(3), 3), (np.True_, True), (np.array(2.0), 2.0),
    (torch.tensor(2), 2), (torch.tensor(0.5), 0.5), (torch.tensor(True), True), ("x", "x"),
    (None, None), (1.5, 1.5),
])  # fmt: skip
def test_plain_scalars(value, plain):
    found = v.plain_scalar(value)
    assert found == plain and type(found) is type(plain)


@pytest.mark.parametrize("value", [
    np.array([1.0]), torch.tensor([1.0]), torch.tensor(1.0, requires_grad=True), [1],
    torch.empty((), device="meta"), Fraction(1, 3), torch.nn.Linear(1, 1),
])  # fmt: skip
def test_other_values_stay_as_they_are(value):
    assert v.plain_scalar(value) is value


def test_values_in_messages():
    class NoRepr:
        def __repr__(self):
            raise RuntimeError("no repr")

    assert v.describe_value(NoRepr()) == "an object of NoRepr"
    assert v.describe_value("a\nb") == "'a\\nb'"
    assert len(v.describe_value("x" * 1000)) < 220
    network = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(9)))
    assert v.describe_value(network) == "an object of Sequential"
    assert "\n" not in v.describe_value(torch.ones(3, 3))


@pytest.mark.parametrize("value", [True, "4", None, float("nan"), float("inf"), -1, 1e-30, 1e5])
def test_temperatures_that_are_refused(value):
    with pytest.raises(ValueError, match="temperature is .*; allowed: "):
        v.check_temperature(value)


@pytest.mark.parametrize("value", [0.001, 1, 20, np.float32(4.0), 10_000])
def test_temperatures_that_are_accepted(value):
    v.check_temperature(value)


def test_temperature():
    v.check_temperature(4)
    with pytest.raises(ValueError, match="temperature is 0; allowed: a finite number above 0"):
        v.check_temperature(0)
