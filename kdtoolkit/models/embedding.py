"""The input of a network's classifier as a vector, the embedding of an image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.tracing import eval_without_gradients
from kdtoolkit.models.head import classifier_names

ResultT = TypeVar("ResultT")


class EmbeddingHook:
    """Reads the input of a network's classifier during a call.

    A feature map is averaged over its positions; the inputs of several classifiers are
    concatenated. A copy of the hook belongs to the copied classifiers.

    Args:
        classifiers: The modules that make the logits.

    Example:
        ```python
        hook = EmbeddingHook.from_taps(taps)
        out, embedding = hook.capture(taps, x)  # embedding: (B, D)
        hook.remove()
        ```
    """

    def __init__(self, classifiers: Sequence[nn.Module]) -> None:
        self._classifiers = list(classifiers)
        self._inputs = [_InputHook(module) for module in classifiers]
        self._handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in zip(classifiers, self._inputs, strict=True)
        ]

    @classmethod
    def from_taps(cls, taps: Taps) -> EmbeddingHook:
        """Make the hook of a network.

        Args:
            taps: The network.

        Returns:
            The hook.

        Raises:
            ValueError: If no classifier is found.
        """
        return cls([taps.model.get_submodule(name) for name in _find_classifiers(taps)])

    def capture(self, call: Callable[..., ResultT], *args: object) -> tuple[ResultT, Tensor]:
        """Call a function that runs the network, and read the embedding.

        Args:
            call: The function.
            *args: Its arguments.

        Returns:
            What the call returns, and the embedding (B, D).

        Raises:
            RuntimeError: If the call does not run the classifier.
        """
        for hook in self._inputs:
            hook.active = True
        try:
            returned = call(*args)
            return returned, torch.cat([hook.read_vector() for hook in self._inputs], dim=1)
        finally:
            for hook in self._inputs:
                hook.active, hook.value = False, None

    def remove(self) -> None:
        """Remove the hook from the network."""
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, object]) -> EmbeddingHook:
        return EmbeddingHook([copy.deepcopy(module, memo) for module in self._classifiers])


class _InputHook:
    """Keeps the input of one module; a copy of the module carries the hook along without effect."""

    is_tap = True

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self.active = False
        self.value: Tensor | None = None

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        if module is self.module and self.active:
            leaves = tree_leaves((args, kwargs))
            self.value = next(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def read_vector(self) -> Tensor:
        """The input as a vector (B, D)."""
        if self.value is None:
            raise RuntimeError(
                f"the classifier ({type(self.module).__name__}) was not called: it has no input to "
                "give"
            )
        if self.value.dim() == 2:
            return self.value
        if isinstance(self.module, nn.Linear):
            return self.value.flatten(1, -2).mean(1)  # (B, ..., D)
        return self.value.flatten(2).mean(2)  # (B, D, ...)

    def __deepcopy__(self, memo: dict[int, object]) -> _InputHook:
        return self

    def __reduce__(self) -> tuple[type[_InputHook], tuple[None]]:
        return _InputHook, (None,)


def embedding_size(taps: Taps) -> int:
    """Measure the size D of a network's embedding (B, D).

    Args:
        taps: The network.

    Returns:
        D, by one forward pass on the meta device where the network can run there.

    Raises:
        ValueError: If no classifier is found.
    """
    traced = taps.trace.model
    hook = EmbeddingHook([traced.get_submodule(name) for name in _find_classifiers(taps)])
    try:
        with eval_without_gradients(traced), torch.no_grad():
            _, embedding = hook.capture(traced, taps.trace.x.detach())
            return embedding.shape[1]
    finally:
        hook.remove()


def _find_classifiers(taps: Taps) -> list[str]:
    names = classifier_names(taps)
    if not names:
        raise ValueError(
            f"no classifier was found in {type(taps.model).__name__} (no get_classifier, and no "
            "nn.Linear makes its logits), and an embedding is a classifier's input: wrap the "
            "network or name its classifier"
        )
    return names
