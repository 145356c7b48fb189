"""The registries of losses and methods, and the decorators that fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.strategy import MethodSpec, StrategySpec
from kdtoolkit.types import LossWeight
from kdtoolkit.utils.registry import Registry

LOSSES: Registry[type[DistillationLoss]] = Registry("loss")
METHODS: Registry[MethodSpec] = Registry("method")

LossClass = TypeVar("LossClass", bound=type[DistillationLoss])
BuildFunction = TypeVar("BuildFunction", bound=Callable[..., Method])


def register_loss(
    name: str, *, losses: Mapping[str, LossWeight] | None = None, title: str = ""
) -> Callable[[LossClass], LossClass]:
    """Register a class of losses under a name; with `losses` also a method of that name.

    Args:
        name: Name in `distill(losses={...})` and, with `losses`, in `distill(method=...)`.
        losses: Losses of the method and their default weights (numbers or schedules), this one
            among them. None registers no method.
        title: One line for `kdtoolkit methods`, with the paper and its year; default the first
            line of the docstring of the class.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: If the name is already registered.

    Example:
        ```python
        import torch.nn.functional as F

        import kdtoolkit


        @kdtoolkit.register_loss("cosine", losses={"ce": 1.0, "cosine": 2.0})
        class Cosine(kdtoolkit.DistillationLoss):
            \"\"\"1 - cosine of the logits of student and teacher.\"\"\"

            needs_taps = False

            def forward(self, student, teacher, batch):
                similarity = F.cosine_similarity(student.logits, teacher.logits)
                return (1 - similarity).mean()


        assert "cosine" in kdtoolkit.list_methods()
        ```
    """

    def register(cls: LossClass) -> LossClass:
        LOSSES.add(name)(cls)
        cls.registered = name
        if losses is not None:
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            METHODS.add(name)(MethodSpec(dict(losses), title or summary))
        return cls

    return register


def register_strategy(
    name: str, *, losses: Mapping[str, LossWeight], title: str = "", needs_teacher: bool = False
) -> Callable[[BuildFunction], BuildFunction]:
    """Register a function that builds a method, usually of several networks.

    The function is `build(given: StrategyInputs, *, options) -> Method`. Its keyword-only
    parameters are the options that `distill()` passes on, with their defaults.

    Args:
        name: Name in `distill(method=...)`.
        losses: Terms of the method and their default weights (numbers or schedules).
        title: One line for `kdtoolkit methods`, with the paper and its year; default the first
            line of the docstring of the function.
        needs_teacher: Whether `distill()` must be given a teacher.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: If the name is already registered.

    Example:
        ```python
        import kdtoolkit
        from kdtoolkit.callbacks import MutualKL


        @kdtoolkit.register_strategy("trio", losses={"ce": 1.0, "mutual": 0.5})
        def trio(given: kdtoolkit.StrategyInputs, *, temperature: float = 1.0) -> kdtoolkit.Method:
            \"\"\"Three networks of one architecture learn from each other.\"\"\"
            networks = [given.student.model, given.make_network(1), given.make_network(2)]
            method = kdtoolkit.Peers(networks, weight=given.weights["ce"], image=given.image)
            method.callbacks = (MutualKL(given.weights["mutual"], temperature=temperature),)
            return method


        result = kdtoolkit.distill(None, "cifar_resnet8", "digits", method="trio", epochs=1)
        ```
    """

    def register(build: BuildFunction) -> BuildFunction:
        summary = (build.__doc__ or "").strip().split("\n")[0]
        METHODS.add(name)(StrategySpec(dict(losses), title or summary, build, needs_teacher))
        return build

    return register
