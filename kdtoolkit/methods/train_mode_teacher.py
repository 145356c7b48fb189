"""A copy of a teacher in train mode, for SOKD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtoolkit.features.extractor import Taps
from kdtoolkit.types import Out, TapKey


class TrainModeTeacher(nn.Module):
    """A copy of the teacher that is in train mode while the method is.

    Targets have batch statistics, and running statistics move. Only these buffers are in the module
    tree, and so in the checkpoint.

    Args:
        network: The copy; its parameters are frozen.
        at: Taps.
        size: Image size, as `Taps` takes it.
    """

    def __init__(self, network: nn.Module, at: Sequence[TapKey], size: Any) -> None:
        super().__init__()
        self.taps = Taps(network.requires_grad_(False), at, size)
        for number, (module, name, persistent) in enumerate(self._network_buffers()):
            self.register_buffer(f"statistic{number}", module._buffers[name], persistent=persistent)

    def _network_buffers(self) -> list[tuple[nn.Module, str, bool]]:
        """(module, name of its buffer, whether it is in the state dict) for all of the network."""
        modules = self.taps.model.modules()
        return [(m, n, n not in m._non_persistent_buffers_set) for m in modules for n in m._buffers]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Out:
        """Logits and features of a prepared image."""
        self.taps.model.train(self.training)
        return self.taps(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainModeTeacher:
        """Move the buffers, and give the network those that came out."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for number, (module, name, _) in enumerate(self._network_buffers()):
            module._buffers[name] = self._buffers[f"statistic{number}"]
        return self
