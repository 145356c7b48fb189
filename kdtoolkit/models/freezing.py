"""Parts of a network that stay as they are while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.models.head import classifier_names
from kdtoolkit.models.layer_groups import modules_up_to, parameters_up_to
from kdtoolkit.utils.registry import suggestion

FreezeSpec = int | str | Sequence[str]


class FrozenParts:
    """The parts of a network that are not trained.

    They get no gradients, and they are in eval mode, so that BatchNorm statistics do not change
    either.

    Attributes:
        parameters: The frozen parameters.
        modules: The frozen modules.
        num_parameters: Number of frozen values.

    Args:
        taps: The network.
        what: A number of stages, counted from the image; names of modules or parameters (a list, or
            one text with commas), with all that is inside them; or "backbone", all but the
            classifier.

    Raises:
        ValueError: If a stage or name does not exist, or nothing is left to train.

    Example:
        ```python
        frozen = FrozenParts(Taps(net, None), 2)
        frozen.apply()
        for images, labels in loader:
            net.train()
            frozen.set_eval_mode()
            ...
        frozen.release()
        ```
    """

    def __init__(self, taps: Taps, what: FreezeSpec) -> None:
        parameters, modules = _find_parts(taps, what)
        model = taps.model
        rest = [p for name, p in model.named_parameters() if name not in parameters]
        if not any(p.requires_grad for p in rest):
            raise ValueError(
                f"freeze={what!r} leaves no parameter of {type(model).__name__} to train: freeze "
                "less, or freeze='backbone' for all but the classifier"
            )
        self.parameters = [p for name, p in model.named_parameters() if name in parameters]
        self.modules = [module for name, module in model.named_modules() if name in modules]
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    def apply(self) -> None:
        """Freeze: take the parameters out of training and put the modules in eval mode."""
        self._flags = [(p, p.requires_grad) for p in self.parameters]
        self._modes = [(module, module.training) for module in self.modules]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        self.set_eval_mode()

    def set_eval_mode(self) -> None:
        """Put the modules in eval mode again, after a `train()` of the whole network."""
        for module in self.modules:
            module.training = False

    def release(self) -> None:
        """Restore gradient flags and modes as they were before `apply`."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        self._flags, self._modes = [], []


def _find_parts(taps: Taps, what: FreezeSpec) -> tuple[set[str], set[str]]:
    """Names of parameters and of modules; "" is the network itself."""
    if isinstance(what, int) and not isinstance(what, bool):
        return _find_stages(taps, what)
    if what == "backbone":
        return _find_backbone(taps)
    names: object = what.split(",") if isinstance(what, str) else what
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"freeze={what!r}: a number of stages from the image, a list of names of modules, or "
            "'backbone' (all but the classifier)"
        )
    return _find_named(taps.model, [name.strip() for name in names])


def _find_stages(taps: Taps, count: int) -> tuple[set[str], set[str]]:
    if not 1 <= count <= len(taps.stages):
        raise ValueError(
            f"freeze={count}: {type(taps.model).__name__} has {len(taps.stages)} stages; give a "
            "number from 1, names of modules, or 'backbone'"
        )
    return set(parameters_up_to(taps, count)), set(modules_up_to(taps, count))


def _find_backbone(taps: Taps) -> tuple[set[str], set[str]]:
    heads = classifier_names(taps)
    if not heads:
        raise ValueError(
            f"freeze='backbone': no classifier was found in {type(taps.model).__name__} (no "
            "get_classifier, and no nn.Linear makes its logits); name the modules to freeze instead"
        )
    head_parameters, head_modules = _find_named(taps.model, heads)
    parameters = {name for name, _ in taps.model.named_parameters()}
    modules = {name for name, _ in taps.model.named_modules()}
    return parameters - head_parameters, modules - head_modules


def _find_named(model: nn.Module, names: Sequence[str]) -> tuple[set[str], set[str]]:
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for name in names:
        if name not in modules and name not in parameters:
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"freeze: {name!r} is no module of {type(model).__name__}; its children: {children}"
                f"{suggestion(name, ['backbone', *modules, *parameters])}"
            )
    inside = tuple(f"{name}." for name in names)
    return (
        {name for name in parameters if f"{name}.".startswith(inside)},
        {name for name in modules if f"{name}.".startswith(inside)},
    )
