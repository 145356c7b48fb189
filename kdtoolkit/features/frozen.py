"""Frozen: a tapped teacher that training cannot change, and that is restored afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdtoolkit.features.bn_folding import ModuleSwap, fold_batch_norms, unfold_batch_norms
from kdtoolkit.features.extractor import Replacement, Taps
from kdtoolkit.features.model_inputs import ImageSize
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.types import Out, TapKey


class Frozen(Taps):
    """A teacher: a tapped model in eval mode, without gradients for its parameters.

    It takes images (B, 3, H, W) in [0, 1] and normalises them itself, in the precision of the
    model's weights, which may be half. The plain pass builds no autograd graph; a pass with a
    replacement that requires grad does. It stays in eval mode whatever is done to the student, and
    is in no checkpoint, because it is not an nn.Module.

    Args:
        model: Any nn.Module that maps images to logits (B, C).
        at: Where features are read, as in `Taps`.
        size: Image size in pixels, as in `Taps`.
        preprocess: Input normalisation; default that of the model's `pretrained_cfg`.
        image: Size (H, W) of the data in pixels, for `Preprocess.from_model`.

    Attributes:
        has_data_classes: Whether its logits are those of the data's classes, so that they can be
            evaluated and learned from.

    Raises:
        ValueError: As `Taps`; the model is left as it was.

    Example:
        ```python
        teacher = Frozen(model, at=[-1])
        logits, feats = teacher(images)
        model = teacher.release()
        ```
    """

    has_data_classes: bool = True

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[TapKey] | None = (),
        size: ImageSize = None,
        *,
        preprocess: Preprocess | None = None,
        image: tuple[int, int] | None = None,
    ) -> None:
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._swaps: list[ModuleSwap] = []
        first = next(model.parameters(), torch.empty(0))
        self._device, self._dtype = first.device, first.dtype
        self._memory_format = _find_memory_format(model)
        self.preprocess = preprocess or Preprocess.from_model(model, image)
        super().__init__(model, at, size)  # where it raises, the model is as it was
        model.eval().requires_grad_(False)

    def __call__(self, x: Tensor, replace: Mapping[TapKey, Replacement] | None = None) -> Out:
        """As `Taps.__call__`, on images in [0, 1]."""
        self._stay_in_eval()
        with torch.set_grad_enabled(_needs_grad(replace)):
            return super().__call__(x, replace)

    def reset(
        self, x: Tensor, replace: Mapping[TapKey, Replacement], want: Sequence[TapKey]
    ) -> dict[TapKey, Tensor]:
        """As `Taps.reset`, on images in [0, 1].

        Args:
            x: Images (B, 3, H, W) in [0, 1].
            replace: Tap -> feature in the shape of that tap; gradients flow into those that require
                them.
            want: Taps whose features are returned, each behind a replaced one.

        Returns:
            Wanted tap -> the model's own stage, run on the replacement of the tap before it.

        Raises:
            ValueError: As `Taps.reset`.
        """
        self._stay_in_eval()
        with torch.set_grad_enabled(_needs_grad(replace)):
            return super().reset(x, replace, want)

    def forward_from(self, x: Tensor, at: TapKey, feature: Replacement) -> Out:
        """As `Taps.forward_from`, on images in [0, 1]."""
        self._stay_in_eval()
        with torch.set_grad_enabled(_needs_grad({at: feature})):
            return super().forward_from(x, at, feature)

    def prepare(self, x: Tensor) -> Tensor:
        """Normalise images, and resize them where the model's own size is fixed.

        Args:
            x: Images (B, 3, H, W) in [0, 1].

        Returns:
            Images as the model takes them, in the data type that its first parameter had when it
            was frozen.
        """
        return self.preprocess(x).to(self._dtype)

    def _resolve_replacements(
        self, replace: Mapping[TapKey, Replacement] | None
    ) -> dict[TapKey, dict[int, Tensor]]:
        resolved = super()._resolve_replacements(replace)
        if self._dtype == torch.float32:
            return resolved
        return {
            key: {index: tensor.to(self._dtype) for index, tensor in tensors.items()}
            for key, tensors in resolved.items()
        }

    def _stay_in_eval(self) -> None:
        for module, _ in self._modes:
            if module.training:
                module.training = False

    def __deepcopy__(self, memo: dict[int, object]) -> Frozen:
        """Itself: a teacher that does not change is shared by the copies of a method."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.model, tuple(self.keys) or None, self.size, self.preprocess)

    def fold_batch_norms(self, dtype: torch.dtype | None = None) -> int:
        """Fold every BatchNorm into its convolution, until `release`. Call it after `select`.

        The function is the same up to rounding (about 1e-6 of a logit in float32); a ResNet takes a
        third less time.

        Args:
            dtype: Precision of the folded weights; None is their own.

        Returns:
            How many were folded.
        """
        keep = {value for boundary in self._boundaries.values() for value in boundary.values}
        swaps = fold_batch_norms(self.model, self.trace, keep=keep, dtype=dtype)
        self._swaps += swaps
        self.select(self.keys)
        return len(swaps) // 2

    def to(self, *args: Any, **kwargs: Any) -> Frozen:
        """Move or convert the model, as `nn.Module.to`.

        Args:
            *args: As `nn.Module.to`.
            **kwargs: As `nn.Module.to`.

        Returns:
            The same object.
        """
        for module in (self.model, *(swap.original for swap in self._swaps)):
            module.to(*args, **kwargs)
        return self

    def release(self) -> nn.Module:
        """Remove the taps and restore the model.

        Returns:
            The model: its modules, modes, flags, device and memory format are as they were.
        """
        self.remove_hooks()
        unfold_batch_norms(self._swaps)
        self._swaps = []
        self.model.to(self._device).to(memory_format=self._memory_format)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        return self.model


def _rebuild(
    model: nn.Module, at: Sequence[TapKey] | None, size: ImageSize, preprocess: Preprocess
) -> Frozen:
    """A pickled teacher."""
    return Frozen(model, at, size, preprocess=preprocess)


def _needs_grad(replace: Mapping[TapKey, Replacement] | None) -> bool:
    """Whether gradients must flow through the frozen network into a replacement."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in tree_leaves(dict(replace or {})))


def _find_memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last if the kernels of the convolutions lie that way."""
    kernels = [
        parameter
        for parameter in model.parameters()
        if parameter.dim() == 4
        and min(parameter.shape[1], parameter.shape[2] * parameter.shape[3]) > 1
    ]
    if kernels and all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels):
        return torch.channels_last
    return torch.contiguous_format
