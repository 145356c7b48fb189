"""The part of a network behind a stage, as a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kdtoolkit.features.extractor import Replacement, Taps
from kdtoolkit.features.model_inputs import ImageSize
from kdtoolkit.models.network_cut import Cut, cut_network, join_names
from kdtoolkit.types import Out, TapKey


class Tail(nn.Module):
    """The part of a complete network behind a stage: `tail(x, feature) -> logits (B, C)`.

    Nothing in front of the stage is computed. Only what lies behind it is in the module tree and in
    the state dict, there under the network's own names behind "parts.".

    Attributes:
        taps: Taps of the complete network.
        stage: Where the tail begins: a stage number from 1, or a tap.
        parts: The modules, parameters and buffers behind the stage.

    Args:
        net: The network, which stays complete.
        stage: Number of a stage or a module's name, as `Taps` takes it.
        size: Image size in pixels, as `Taps` takes it.
        read: Further taps: `run` returns the features of those behind the stage, `run_network` of
            all.

    Raises:
        ValueError: If the network cannot be cut there.
    """

    def __init__(
        self,
        net: nn.Module,
        stage: TapKey,
        size: ImageSize = None,
        *,
        read: Sequence[TapKey] = (),
    ) -> None:
        super().__init__()
        self.taps = Taps(net, None, size)
        self.stage = self.taps.resolve_key(stage)
        cut = cut_network(self.taps, stage)
        self.parts = _copy_structure(net, cut)
        self._mixed = tuple(
            (net.get_submodule(name), _find_module(self.parts, name)) for name in cut.mixed
        )
        self.taps.select([self.stage, *read])

    @property
    def network(self) -> nn.Module:
        """The complete network."""
        return self.taps.model

    def forward(self, x: Tensor, feature: Replacement) -> Tensor:
        """Compute logits from the output of the stage.

        Args:
            x: Images (B, 3, H, W), as the network takes them; only their size is read.
            feature: Output of the stage: one tensor, or one for each of its boundary, see
                `boundary_taps`.

        Returns:
            Logits (B, C).
        """
        return self.run(x, feature).logits

    def run(self, x: Tensor, feature: Replacement) -> Out:
        """Compute logits and features behind the stage; arguments as `forward`."""
        self._synchronise_modes()
        return self.taps.forward_from(x, self.stage, feature)

    def run_network(self, x: Tensor) -> Out:
        """Run the complete network on images (B, 3, H, W).

        Args:
            x: The images, as the network takes them.

        Returns:
            Logits (B, C), and the features of all taps.
        """
        self._synchronise_modes()
        return self.taps(x)

    def train(self, mode: bool = True) -> Tail:
        """Set train or eval mode, of modules that hold both sides too."""
        super().train(mode)
        self._synchronise_modes()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Tail:
        """Move or cast; mixed modules and their copies in `parts` then hold the same tensors."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, copied in self._mixed:
            if copied is not None:
                module._buffers.update(copied._buffers)
                module._parameters.update(copied._parameters)
        return self

    def _synchronise_modes(self) -> None:
        """Give mixed modules the mode of their copies in `parts`."""
        for module, copied in self._mixed:
            module.training = (self.parts if copied is None else copied).training


def _copy_structure(net: nn.Module, cut: Cut) -> nn.Module:
    """A tree of empty modules that hold the modules, parameters and buffers behind the cut."""
    root = nn.Module()
    for name in cut.tail:
        parent, last = _make_parent(root, name)
        parent.add_module(last, net.get_submodule(name))
    for name in cut.tail_parameters:
        parent, last = _make_parent(root, name)
        parent.register_parameter(last, net.get_parameter(name))
    for name in cut.mixed:
        module = net.get_submodule(name)
        for last, buffer in module._buffers.items():
            parent, _ = _make_parent(root, join_names(name, last))
            is_saved = last not in module._non_persistent_buffers_set
            parent.register_buffer(last, buffer, persistent=is_saved)
    return root


def _make_parent(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, made where it does not exist, and the last part of the path."""
    *names, last = path.split(".")
    for name in names:
        child = root._modules.get(name)
        if child is None:
            child = nn.Module()
            root.add_module(name, child)
        root = child
    return root, last


def _find_module(root: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        child = root._modules.get(name)
        if child is None:
            return None
        root = child
    return root
