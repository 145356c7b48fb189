"""Parts of a network that stay as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.models.head import classifier_names
from kdtoolkit.models.layer_groups import modules_up_to, parameters_up_to
from kdtoolkit.utils.registry import suggestion


class FrozenParts:
    """What of a network is not trained: no gradients, and eval mode, so that BatchNorm statistics stay bit for bit.

    what  a number of stages, counted from the image; names of modules or parameters, with all that is inside; or
          "backbone", all but the classifier
    ValueError for a stage or name that does not exist, or when nothing is left to train. `apply` begins, `release` puts
    flags and modes back as they were; `count` is the number of parameters.
    """

    def __init__(self, taps: Taps, what: Any):
        parameters, modules = _chosen(taps, what)
        model = taps.model
        if not any(
            p.requires_grad for name, p in model.named_parameters() if name not in parameters
        ):
            raise ValueError(
                f"freeze={what!r} leaves no parameter of {type(model).__name__} to train: freeze less, or "
                "freeze='backbone' for all but the classifier"
            )
        self.parameters = [p for name, p in model.named_parameters() if name in parameters]
        self.modules = [module for name, module in model.named_modules() if name in modules]
        self.count = sum(p.numel() for p in self.parameters)
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    def apply(self) -> None:
        self._flags = [(p, p.requires_grad) for p in self.parameters]
        self._modes = [(m, m.training) for m in self.modules]
        for p in self.parameters:
            p.requires_grad_(False)
        self.stay()

    def stay(self) -> None:
        """Eval mode again, after a train() of the whole network."""
        for module in self.modules:
            module.training = False

    def release(self) -> None:
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for m, mode in self._modes:
            m.training = mode
        self._flags, self._modes = [], []


def _chosen(taps: Taps, what: Any) -> tuple[set[str], set[str]]:
    """Names of parameters and of modules; "" is the network itself."""
    if isinstance(what, int) and not isinstance(what, bool):
        if not 1 <= what <= len(taps.stages):
            raise ValueError(
                f"freeze={what}: {type(taps.model).__name__} has {len(taps.stages)} stages; give a number from 1, "
                "names of modules, or 'backbone'"
            )
        return set(parameters_up_to(taps, what)), set(modules_up_to(taps, what))
    if what == "backbone":
        return _backbone(taps)
    names = what.split(",") if isinstance(what, str) else what
    if (
        not isinstance(names, Sequence)
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(
            f"freeze={what!r}: a number of stages from the image, a list of names of modules, or 'backbone' (all but "
            "the classifier)"
        )
    return _named(taps.model, [name.strip() for name in names])


def _backbone(taps: Taps) -> tuple[set[str], set[str]]:
    heads = classifier_names(taps)
    if not heads:
        raise ValueError(
            f"freeze='backbone': no classifier was found in {type(taps.model).__name__} (no get_classifier, and no "
            "nn.Linear makes its logits); name the modules to freeze instead"
        )
    parameters, modules = _named(taps.model, heads)
    every = {name for name, _ in taps.model.named_modules()}
    return {name for name, _ in taps.model.named_parameters()} - parameters, every - modules


def _named(model: nn.Module, names: Sequence[str]) -> tuple[set[str], set[str]]:
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for name in names:
        if name not in modules and name not in parameters:
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"freeze: {name!r} is no module of {type(model).__name__}; its children: {children}"
                f"{suggestion(name, ['backbone', *modules, *parameters])}"
            )

    def inside(name: str) -> bool:
        return any(name == n or name.startswith(f"{n}.") for n in names)

    return {name for name in parameters if inside(name)}, {name for name in modules if inside(name)}
