"""Run parts of a tapped network: single stages, or everything behind a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kdtoolkit.features.hooks import Replacements
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.module_chain import find_module_chain
from kdtoolkit.features.reset_check import find_reset_errors
from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.features.stubs import ModuleStubs
from kdtoolkit.types import TapKey


class StageRunner:
    """Knows how the stages between some taps can be run; what it finds out is remembered.

    Args:
        model: The model.
        trace: Its trace.
        boundaries: The taps and their boundaries.
    """

    def __init__(
        self, model: nn.Module, trace: ModelTrace, boundaries: Mapping[TapKey, StageBoundary]
    ) -> None:
        self.model, self.trace, self.boundaries = model, trace, boundaries
        self.order = sorted(boundaries, key=lambda key: boundaries[key].returned_at)
        self._chains: dict[tuple[TapKey, TapKey], list[nn.Module] | None] = {}
        self._stubs: dict[TapKey, ModuleStubs | None] = {}

    def run_alone(
        self, replaced: Replacements, want: Sequence[TapKey]
    ) -> dict[TapKey, Tensor] | None:
        """Run wanted stages one by one, each on the replacement in front of it.

        Args:
            replaced: Tap -> {index of a tensor in its boundary: feature}.
            want: Taps at which the wanted stages end.

        Returns:
            Wanted tap -> output; None where a stage is no chain of called modules.

        Raises:
            ValueError: If nothing is replaced in front of a wanted tap.
        """
        starts = {key: self._replaced_before(key, replaced) for key in want}
        chains = {key: self._module_chain(starts[key], key) for key in want}
        outputs: dict[TapKey, Tensor] = {}
        if any(chain is None for chain in chains.values()):
            return None
        for key, chain in chains.items():
            (feature,) = replaced[starts[key]].values()
            for module in chain or ():
                feature = module(feature)
            outputs[key] = feature
        return outputs

    def skip_before(self, key: TapKey, batch: int) -> contextlib.AbstractContextManager[None]:
        """Compute nothing in front of a replaced tap, where nothing else reads it.

        Args:
            key: The tap.
            batch: Number of images of the forward.
        """
        if key not in self._stubs:
            boundary = self.boundaries[key]
            is_exact = not find_reset_errors(self.trace, {key: boundary})
            self._stubs[key] = ModuleStubs(self.model, self.trace, boundary) if is_exact else None
        stubs = self._stubs[key]
        return contextlib.nullcontext() if stubs is None else stubs.installed(batch)

    def _replaced_before(self, key: TapKey, replaced: Replacements) -> TapKey:
        """The last replaced tap in front of a wanted one."""
        until = self.boundaries[key].returned_at
        for earlier in reversed(self.order):
            if earlier in replaced and self.boundaries[earlier].returned_at < until:
                return earlier
        raise ValueError(
            f"nothing is replaced in front of {key!r}, its reset output would be the plain one"
        )

    def _module_chain(self, start: TapKey, end: TapKey) -> list[nn.Module] | None:
        """The modules from one tap to another, where they can be run alone."""
        if (start, end) not in self._chains:
            names = find_module_chain(self.trace, self.boundaries[start], self.boundaries[end])
            modules = None if names is None else [self.model.get_submodule(n) for n in names]
            self._chains[start, end] = modules
        return self._chains[start, end]
