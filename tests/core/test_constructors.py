"""Every public callback, schedule, loss, method and configuration refuses what it cannot use."""

from __future__ import annotations

import functools
import inspect

import pytest
import timm
import torch

from kdtoolkit import callbacks, schedules
from kdtoolkit.callbacks import EMATeacher
from kdtoolkit.core.callback import Callback
from kdtoolkit.core.config import TrainerConfig
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.methods import BYOT, SOKD, Branches, Peers
from kdtoolkit.methods.bake import BAKE
from tests.wrong_values import (
    FLAG,
    FROM_0,
    POSITIVE,
    POSITIVE_WHOLE,
    SHARE,
    TEXT,
    VALUES,
    fault_of,
    wrong_values,
)

WEIGHT = (*FROM_0, "function")
WHOLE = ("0", *POSITIVE_WHOLE)
TEMPERATURE = (*POSITIVE_WHOLE, "1.5")
BELOW_1 = ("0", "tiny")
# class -> argument -> the values that it takes
ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    "Checkpoints": {"every": POSITIVE_WHOLE},
    "DCLMerger": {
        "every": POSITIVE_WHOLE, "beta": SHARE, "eps": (*FROM_0, "huge"), "start": SHARE,
        "until": SHARE,
    },
    "DecayingEnsemble": {
        "weight": WEIGHT, "rate": (*FROM_0, "huge"), "cut": BELOW_1, "length": ("None",),
        "temperature": TEMPERATURE,
    },
    "Diversity": {"every": POSITIVE_WHOLE, "after": WHOLE},
    "EMATeacher": {
        "weight": WEIGHT, "decay": ("None", *SHARE), "temperature": TEMPERATURE,
        "view": ("None", *WHOLE), "init_steps": WHOLE, "init_lr": ("None", *POSITIVE, "huge"),
        "export": (*FLAG, *TEXT[1:]), "term": TEXT[1:], "product": tuple(VALUES),
    },
    "EarlyStop": {"patience": POSITIVE_WHOLE, "min_delta": FROM_0},
    "KDCL": {"weight": WEIGHT, "temperature": TEMPERATURE},
    "MutualKL": {"weight": WEIGHT, "temperature": TEMPERATURE, "detach": FLAG},
    "ProgressLog": {"interval": (*FROM_0, "huge"), "label": TEXT},
    "Trackers": {"config": ("{}", "{'nonsense': 1}", "{1: 2}")},
    "Linear": {
        "start": (*FROM_0, "huge"), "end": (*FROM_0, "huge"), "begin": SHARE, "until": SHARE,
    },
    "Cosine": {
        "start": (*FROM_0, "huge"), "end": (*FROM_0, "huge"), "begin": SHARE, "until": SHARE,
    },
    "Steps": {"at": ("[1]",)},
    "SigmoidRampUp": {"weight": (*FROM_0, "huge"), "length": ("None", *FROM_0, "huge")},
    "LinearRampUp": {
        "weight": (*FROM_0, "huge"), "length": (*FROM_0, "huge"), "first": WHOLE,
    },
    "ExponentialDecay": {
        "weight": (*FROM_0, "huge"), "rate": (*FROM_0, "huge"), "cut": BELOW_1,
    },
    "RampUpAsCoded": {"weight": (*POSITIVE, "huge"), "until": (*FROM_0, "huge")},
    "TrainerConfig": {
        "epochs": ("None", *POSITIVE_WHOLE), "max_steps": ("None",), "batch_size": POSITIVE_WHOLE,
        "optimizer": TEXT, "lr": POSITIVE, "weight_decay": FROM_0, "momentum": BELOW_1,
        "layer_decay": ("None", "1", "tiny"), "milestones": ("[]", "()", "[1]"), "gamma": FROM_0,
        "warmup_epochs": FROM_0, "grad_accum": POSITIVE_WHOLE,
        "grad_clip": ("None", *POSITIVE, "huge"), "channels_last": FLAG, "compile": FLAG,
        "seed": WHOLE, "log_every": POSITIVE_WHOLE, "eval_every": POSITIVE_WHOLE,
        "monitor": ("None",),
    },
    "Peers": {
        "weight": WEIGHT, "views": FLAG, "label_smoothing": BELOW_1,
        "image": ("None", *POSITIVE_WHOLE), "spread": FLAG, "unlabelled": FLAG,
    },
    "Branches": {
        "branches": ("3",), "cut": ("-1", *POSITIVE_WHOLE), "join": ("None",),
        "weights": ("None", "{}"), "views": FLAG, "share_gradient": FLAG,
        "label_smoothing": BELOW_1, "image": ("None", *POSITIVE_WHOLE), "preprocess": ("None",),
        "best": FLAG,
    },
    "BYOT": {
        "weights": ("None", "{}"), "temperature": TEMPERATURE, "exempt": ("None", "1"),
        "stages": ("[1]",), "preprocess": ("None",), "image": ("None", *POSITIVE_WHOLE),
    },
    "BAKE": {
        "weights": ("None", "{}"), "temperature": TEMPERATURE, "omega": BELOW_1,
        "partners": WHOLE, "preprocess": ("None",), "image": ("None", *POSITIVE_WHOLE),
    },
    "SOKD": {
        "weights": ("None", "{}"), "temperature": TEMPERATURE, "cut": ("-1", *POSITIVE_WHOLE),
        "preprocess": ("None",), "image": ("None", *POSITIVE_WHOLE),
    },
    "KD": {"pairs": tuple(VALUES), "temperature": TEMPERATURE},
    "Logits": {"pairs": tuple(VALUES)},
    "CrossEntropy": {"pairs": tuple(VALUES), "teacher": ("None",), "label_smoothing": BELOW_1},
    "AT": {"p": ("1", "3", "1.5")},
    "SRKD": {"reset": ("[]", "()", "[1]"), "detach": FLAG, "stem": ("None",)},
    "FitNet": {"hint": ("-1", "1")},
}  # fmt: skip
SCHEDULES = ("Linear", "Cosine", "Steps", "SigmoidRampUp", "LinearRampUp", "ExponentialDecay",
             "RampUpAsCoded")  # fmt: skip
GIVEN = {
    "Linear": {"start": 1.0, "end": 0.0},
    "Cosine": {"start": 1.0, "end": 0.0},
    "Steps": {"at": (0.5,), "values": (1.0, 0.0)},
    "Trackers": {"config": {}},
    "TrainerConfig": {},
}


def _callbacks() -> dict[str, type]:
    found = [getattr(callbacks, name) for name in callbacks.__all__]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Callback)]
    return {kind.__name__: kind for kind in kinds if kind is not Callback}


CLASSES: dict[str, type] = {
    **_callbacks(),
    **{name: getattr(schedules, name) for name in SCHEDULES},
    **{kind.__name__: kind for kind in (TrainerConfig, Peers, Branches, BYOT, SOKD, BAKE)},
    **{LOSSES[name].__name__: LOSSES[name] for name in LOSSES.names()
       if LOSSES[name].__module__.startswith("kdtoolkit.")},
}  # fmt: skip
ARGUMENTS = [(name, argument) for name, kind in CLASSES.items()
             for argument in inspect.signature(kind).parameters]  # fmt: skip


@functools.cache
def _network(number: int) -> torch.nn.Module:
    torch.manual_seed(number)
    return timm.create_model("cifar_resnet8", num_classes=10)


@functools.cache
def _taps() -> tuple[Taps, Frozen]:
    return Taps(_network(0), [2, 3], 16), Frozen(_network(1), [2, 3], 16)


def given(name: str) -> dict[str, object]:
    """Arguments with which a class can be made."""
    if name in GIVEN or name in _callbacks() or name in SCHEDULES:
        return dict(GIVEN.get(name, {}))
    if name == "Peers":
        return {"networks": [_network(0), _network(1)]}
    if name == "Branches":
        return {"networks": _network(0)}
    student, teacher = _taps()
    if name in ("BYOT", "BAKE"):
        return {"student": student}
    pairs = {} if name == "SOKD" else {"pairs": [(2, 2), (3, 3)]}
    return {"student": student, "teacher": teacher, **pairs}


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_wrong_values_are_refused_when_it_is_made(name, argument):
    faults = {}
    for label, value in wrong_values(ALLOWED.get(name, {}).get(argument, ())).items():
        make = functools.partial(CLASSES[name], **{**given(name), argument: value})
        faults[label] = fault_of(make)
    assert not {label: fault for label, fault in faults.items() if fault is not None}


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("SOKD", "Branches", "BAKE")])
def test_it_can_be_made(name):
    CLASSES[name](**given(name))


def test_there_is_a_table_for_every_class():
    known = {name for name in CLASSES if len(inspect.signature(CLASSES[name]).parameters) > 0}
    assert set(ALLOWED) <= known
    assert len(ARGUMENTS) > 100


@pytest.mark.parametrize("value", ["", 1, None])
def test_an_average_is_exported_by_name_or_not(value):
    with pytest.raises(ValueError, match="export is .*; allowed: True, False"):
        EMATeacher(export=value)
