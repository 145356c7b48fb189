"""Taps: read the intermediate features of any network, and run its stages on other features.

A forward hook on the module (rarely: modules) that ends a stage stores its output and, in a reset
pass, returns the replacement in its place. Nothing else of the model is touched: whatever comes
next takes what the hook returned.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdtoolkit.features.feature_checks import OVERWRITTEN, check_features, check_logits
from kdtoolkit.features.hooks import FeatureStore, Replacements, StopForward, register_hooks
from kdtoolkit.features.model_inputs import ImageSize, image_size
from kdtoolkit.features.model_trace import ModelTrace
from kdtoolkit.features.reset_check import find_reset_errors
from kdtoolkit.features.stage_boundary import StageBoundary
from kdtoolkit.features.stage_runner import StageRunner
from kdtoolkit.features.stages import find_stages
from kdtoolkit.features.stem import find_stem
from kdtoolkit.features.tap_lookup import boundary_by_name, stage_by_number
from kdtoolkit.features.tracing import trace_model
from kdtoolkit.types import Out, Shape, TapKey

# of the feature at a tap: one tensor, or several where the stage ends in several
Replacement = Tensor | Sequence[Tensor]
RawForward = Callable[[Tensor, Replacements], tuple[object, dict[TapKey, Tensor]]]


class Taps:
    """A model whose intermediate features are read at taps.

    It is not an nn.Module: it adds no parameters, no state and no prefix to the model's names.

    Args:
        model: Any nn.Module that maps images (B, 3, H, W) to logits (B, C).
        at: Where features are read: stage numbers (1 is the first, -1 the last), module names, or
            members of what a module returns ("stage3[1]", "backbone[out]"). () taps every stage,
            None nothing.
        size: Image size in pixels: (3, H, W), (H, W) or H; default the model's own, else 224.

    Attributes:
        model: The model.
        size: Image size (channels, H, W).

    Raises:
        ValueError: If a tap does not exist, does not run exactly once, returns no feature of the
            image, or is overwritten in place.

    Example:
        ```python
        taps = Taps(model, at=[1, "layer2", -1], size=224)
        logits, feats = taps(images)
        feats["layer2"]  # (B, *taps.shapes["layer2"])
        ```
    """

    def __init__(
        self, model: nn.Module, at: Sequence[TapKey] | None = (), size: ImageSize = None
    ) -> None:
        if isinstance(at, (str, int)):
            raise ValueError(
                f"at={at!r}: give a list of taps, [{at!r}]; () is every stage, None none"
            )
        self.model = model
        self.size = image_size(model, size)
        self._store = FeatureStore()
        self._handles: list[RemovableHandle] = []
        self._trace: ModelTrace | None = None
        self._stages: list[StageBoundary] | None = None
        self._boundaries: dict[TapKey, StageBoundary] = {}
        self._stage_runner: StageRunner | None = None
        self._forward: RawForward = self._run_model
        if at is not None:
            self.select(list(at) if at else list(range(1, len(self.stages) + 1)))

    # --- structure
    @property
    def trace(self) -> ModelTrace:
        """One forward of the model, on the meta device where the model can run there."""
        if self._trace is None:
            self._trace = trace_model(self.model, self.size)
        return self._trace

    @property
    def stages(self) -> list[StageBoundary]:
        """The ends of all stages that were found, tapped or not, shallow to deep."""
        if self._stages is None:
            self._stages = find_stages(self.trace)
        return self._stages

    @property
    def _runner(self) -> StageRunner:
        if self._stage_runner is None:
            self._stage_runner = StageRunner(self.model, self.trace, self._boundaries)
        return self._stage_runner

    @property
    def keys(self) -> list[TapKey]:
        """The taps."""
        return list(self._boundaries)

    @property
    def shapes(self) -> dict[TapKey, Shape]:
        """Tap -> shape of its feature, without the batch.

        Where a stage ends in several tensors, the feature is the one that the stage is known for;
        `boundary_of(tap).read_tensors` lists what goes on to the next stage.
        """
        return {key: boundary.shape for key, boundary in self._boundaries.items()}

    @property
    def names(self) -> dict[TapKey, str]:
        """Tap -> the module that ends the stage."""
        return {key: boundary.name for key, boundary in self._boundaries.items()}

    @property
    def strides(self) -> dict[TapKey, float]:
        """Tap -> image height over the height of its feature."""
        return {key: boundary.stride for key, boundary in self._boundaries.items()}

    def resolve_key(self, key: TapKey) -> TapKey:
        """The key of a tap's feature: -1 becomes the number of the last stage.

        Args:
            key: Stage number, negative from the end, or a name.

        Returns:
            The positive number for a negative one; every other key as it is. Whether there is such
            a stage is not checked.
        """
        return key + len(self.stages) + 1 if isinstance(key, int) and key < 0 else key

    def boundary_of(self, key: TapKey) -> StageBoundary:
        """The end of the stage that a key means, tapped or not.

        Args:
            key: Stage number, or name of a module.

        Raises:
            ValueError: If there is no such stage or module, it does not run exactly once, or it
                returns no feature of the image.
        """
        if isinstance(key, int):
            return stage_by_number(self.model, self.stages, key)
        return boundary_by_name(self.model, self.trace, key)

    def find_stem(self) -> StageBoundary | None:
        """The boundary in front of the first stage; None where there is none that can be replaced.

        Returns:
            What the first stage takes, with the module that returns it.
        """
        return find_stem(self.trace, self.stages)

    def select(self, keys: Sequence[TapKey]) -> Taps:
        """Put taps here and nowhere else.

        Args:
            keys: Stage numbers or names; a negative number becomes the positive one.

        Returns:
            The same object.

        Raises:
            ValueError: As the constructor.
        """
        boundaries = {self.resolve_key(key): self.boundary_of(key) for key in keys}
        for key, boundary in boundaries.items():
            if boundary.overwritten:
                raise ValueError(f"tap {key!r} ({boundary.name}) {OVERWRITTEN}")
        self.remove_hooks()
        self._boundaries = boundaries
        for key, boundary in boundaries.items():
            self._handles += register_hooks(self.model, key, boundary, self._store)
        return self

    def remove_hooks(self) -> None:
        """Remove every tap; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._boundaries, self._stage_runner = [], {}, None

    def __deepcopy__(self, memo: dict[int, object]) -> Taps:
        """Taps of the copied model, with the structure that was found already."""
        taps = self._with_model(copy.deepcopy(self.model, memo))
        memo[id(self)] = taps
        return taps.select(self.keys)

    def _with_model(self, model: nn.Module) -> Taps:
        """Another model of the same structure, without taps."""
        taps = Taps(model, None, self.size)
        taps._trace, taps._stages = self._trace, self._stages
        return taps

    def __reduce__(self) -> tuple[object, ...]:
        return Taps, (self.model, tuple(self.keys) or None, self.size)

    def compile(self) -> None:
        """Compile the forward with torch.compile; taps must not be changed afterwards."""
        self._forward = torch.compile(self._run_model)

    # --- forward
    def __call__(self, x: Tensor, replace: Mapping[TapKey, Replacement] | None = None) -> Out:
        """Run the model.

        Args:
            x: Images (B, 3, H, W).
            replace: Tap -> feature that the rest of the network gets in place of that stage's
                output: one tensor for each of `boundary_of(tap).read_tensors`.

        Returns:
            Logits (B, C), and the features of the taps; of a replaced tap still the model's own.

        Raises:
            ValueError: If a replaced tap does not exist or cannot be replaced, or the model does
                not return one tensor.
            RuntimeError: If a tap did not fire, or its feature was overwritten or lost its
                gradient.
        """
        returned, feats = self._forward(self.prepare(x), self._resolve_replacements(replace))
        logits = check_logits(self.model, returned)
        check_features(self.model, self.trace, self._store, self._boundaries)
        return Out(logits, feats)

    def prepare(self, x: Tensor) -> Tensor:
        """What is done to images before the model: nothing here.

        Args:
            x: Images (B, 3, H, W), as the model takes them.

        Returns:
            The same images.
        """
        return x

    def _run_model(self, x: Tensor, replace: Replacements) -> tuple[object, dict[TapKey, Tensor]]:
        """What the model returns, and the features of those taps that fired."""
        store = self._store
        store.begin(replace)
        try:
            returned = self.model(x)
        finally:
            store.active = False
        return returned, {
            key: store.feats[key, boundary.main_index]
            for key, boundary in self._boundaries.items()
            if (key, boundary.main_index) in store.feats
        }

    def _resolve_replacements(
        self, replace: Mapping[TapKey, Replacement] | None
    ) -> dict[TapKey, dict[int, Tensor]]:
        """Tap -> {index of a tensor in its boundary: new tensor}."""
        resolved: dict[TapKey, dict[int, Tensor]] = {}
        for given, value in (replace or {}).items():
            key = self.resolve_key(given)
            tensors = [value] if isinstance(value, Tensor) else list(value)
            if key not in self._boundaries:
                taps = ", ".join(map(repr, self._boundaries))
                raise ValueError(f"cannot replace {key!r}, no tap is there; taps: {taps}")
            self.check_replaceable(key)
            boundary = self._boundaries[key]
            expected = boundary.read_tensors
            if len(tensors) != len(expected):
                names = ", ".join(f"{t.name} {tuple(t.shape)}" for t in expected)
                raise ValueError(
                    f"stage {key!r} of {type(self.model).__name__} ends in {len(expected)} "
                    f"tensors, {len(tensors)} were given; give one for each of: {names}"
                )
            resolved[key] = dict(zip(boundary.read_indices, tensors, strict=True))
        return resolved

    # --- reset
    def check_replaceable(self, key: TapKey) -> None:
        """Check that the output of a tap can be replaced.

        Args:
            key: Stage number, or name of a module.

        Raises:
            ValueError: If other paths lead past it from the image to the logits.
        """
        boundary = self.boundary_of(key)
        if not boundary.replaceable:
            raise ValueError(
                f"cannot reset {type(self.model).__name__} at {key!r} ({boundary.name}): other "
                "paths lead past it from the image to the logits; choose a tap where the whole "
                "network passes through one tensor"
            )

    def find_reset_errors(self, keys: Sequence[TapKey]) -> list[str]:
        """Find what is wrong with a reset at several taps at once.

        Args:
            keys: Stage numbers or names, tapped or not.

        Returns:
            One sentence each; [] if the reset is exact: every stage behind a reset one, and the
            logits, depend on all tensors of the boundary in front of them, and on nothing else.

        Raises:
            ValueError: If the output of a tap cannot be replaced.
        """
        boundaries = {self.resolve_key(key): self.boundary_of(key) for key in keys}
        order = sorted(boundaries, key=lambda key: boundaries[key].returned_at)
        for key in order:
            self.check_replaceable(key)
        return find_reset_errors(self.trace, {key: boundaries[key] for key in order})

    def reset(
        self, x: Tensor, replace: Mapping[TapKey, Replacement], want: Sequence[TapKey]
    ) -> dict[TapKey, Tensor]:
        """Run stages on other features than the model's own: stage-reset forwarding.

        A stage that is a chain of called modules is run by itself. Where that holds for every
        wanted tap, nothing in front of the first replacement, between the stages or behind the last
        is computed; else it is one forward that begins behind the first replacement and stops after
        the last wanted tap.

        Args:
            x: Images (B, 3, H, W), needed only where a stage cannot be run alone.
            replace: Tap -> feature in the shape of that tap.
            want: Taps whose features are returned, each behind a replaced one.

        Returns:
            Wanted tap -> the model's own stage, run on the replacement of the tap before it.

        Raises:
            ValueError: If nothing is replaced in front of a wanted tap, or as `__call__`.
        """
        replaced = self._resolve_replacements(replace)
        outputs = self._runner.run_alone(replaced, want)
        return self._reset_in_one_forward(x, replaced, want) if outputs is None else outputs

    def _reset_in_one_forward(
        self, x: Tensor, replaced: Replacements, want: Sequence[TapKey]
    ) -> dict[TapKey, Tensor]:
        position = self._runner.order.index
        first, last = min(replaced, key=position), max(want, key=position)
        self._store.begin(replaced, last)
        try:
            with self._runner.skip_before(first, x.shape[0]), contextlib.suppress(StopForward):
                self.model(self.prepare(x))
        finally:
            self._store.active = False
        return {key: self._store.feats[key, self._boundaries[key].main_index] for key in want}

    def forward_from(self, x: Tensor, at: TapKey, feature: Replacement) -> Out:
        """Run the network behind a stage; nothing in front of it is computed.

        Args:
            x: Images (B, 3, H, W); only their size matters.
            at: The stage.
            feature: What takes the place of its output: one tensor for each of
                `boundary_of(at).read_tensors`.

        Returns:
            Logits (B, C), and the features of the taps behind the stage.

        Raises:
            ValueError: As `__call__`.
            RuntimeError: As `__call__`.
        """
        replaced = self._resolve_replacements({at: feature})
        until = self.boundary_of(at).returned_at
        with self._runner.skip_before(self.resolve_key(at), x.shape[0]):
            returned, feats = self._run_model(self.prepare(x), replaced)
        behind = {key: b for key, b in self._boundaries.items() if b.returned_at > until}
        logits = check_logits(self.model, returned)
        check_features(self.model, self.trace, self._store, behind)
        return Out(logits, {key: feats[key] for key in behind})

    def check_training_forward(self) -> None:
        """Run a forward in training mode on the meta device.

        What would fail in the first batch fails now. Models that cannot run on the meta device are
        not checked.

        Raises:
            ValueError: If the logits are not one tensor.
            RuntimeError: If a tap does not fire exactly once.
        """
        structure = self.trace.model
        if structure is self.model:
            return
        taps = self._with_model(structure)
        try:
            taps.select(self.keys)
            structure.train()
            try:
                returned, _ = taps._run_model(self.trace.x.detach(), {})
            except Exception:  # data-dependent code
                return
            check_logits(structure, returned)
            check_features(structure, self.trace, taps._store, taps._boundaries)
        finally:
            structure.eval()
            taps.remove_hooks()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            """Methods under their names of version 0.1; they go with the next release."""
            if name not in _RENAMED_METHODS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = _RENAMED_METHODS[name]
            warnings.warn(
                f"{type(self).__name__}.{name} is named {new} now; "
                "the old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(self, new)


_RENAMED_METHODS = {
    "check_cut": "check_replaceable",
    "end": "boundary_of",
    "fold": "fold_batch_norms",  # of Frozen
    "key": "resolve_key",
    "rehearse": "check_training_forward",
    "remove": "remove_hooks",
    "rest": "forward_from",
}
