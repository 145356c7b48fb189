"""What one traced forward pass showed of a model: the calls of its modules, and its stage table."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

from torch import Tensor, nn

from kdtoolkit.features.autograd_graph import GraphValue, find_dominators


class StageEntry(TypedDict, total=False):
    """One row of timm's `feature_info`: a stage as the model describes it itself."""

    module: str  # name of the module that ends the stage
    num_chs: int  # channels of its feature
    reduction: float  # image height over the height of the feature


@dataclass(frozen=True)
class TracedOutput:
    """One tensor that a module returned.

    Attributes:
        shape: Its shape, with the batch.
        value: Its place in the autograd graph.
        leaf_index: Its place among the leaves of the module's output, a pytree.
        path: How that place is written behind the module's name: "" where the output is a tensor,
            "[1]" in a tuple, "[out]" in a dict.
    """

    shape: tuple[int, ...]
    value: GraphValue
    leaf_index: int
    path: str


@dataclass
class ModuleCall:
    """One call of one module during the traced forward.

    Attributes:
        name: Name of the module.
        called_at: Position of the call in the order of all calls and returns.
        returned_at: Position of the return in the same order.
        inputs: Tensors among its arguments that depend on the image.
        takes_one_tensor: Whether it was called with one positional tensor and nothing else.
        returns_tensor: Whether it returned a tensor, not a tuple, list or dict.
        outputs: Tensors of its output that depend on the image.
        overwritten: Whether something later wrote into one of the outputs in place.
    """

    name: str
    called_at: int
    returned_at: int
    inputs: list[GraphValue]
    takes_one_tensor: bool
    returns_tensor: bool
    outputs: list[TracedOutput] = field(default_factory=list)
    overwritten: bool = False

    @cached_property
    def output_values(self) -> list[GraphValue]:
        """The outputs' places in the autograd graph."""
        return [output.value for output in self.outputs]


@dataclass
class ModelTrace:
    """What one forward pass showed of a model.

    Attributes:
        model: The model that ran, mostly a copy on the meta device.
        x: The image, (B, channels, H, W); a leaf of the autograd graph.
        logits: Tensors of the model's output that depend on the image.
        calls: Name of a module -> its calls, in order.
        returns_tensor: Whether the model returned a tensor, not a tuple, list or dict.
    """

    model: nn.Module
    x: Tensor
    logits: list[Tensor]
    calls: dict[str, list[ModuleCall]]
    returns_tensor: bool

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the model by its name."""
        return dict(self.model.named_modules())

    @cached_property
    def stage_table(self) -> list[StageEntry]:
        """The stages as the model describes them itself."""
        return read_stage_table(self.model)

    @cached_property
    def dominators(self) -> set[GraphValue]:
        """Values on every path from the image to the logits."""
        return find_dominators(self.logits, self.x)

    def single_call(self, name: str) -> ModuleCall | None:
        """The call of a module that runs exactly once in a forward, else None.

        Args:
            name: Full name of the module.

        Returns:
            The call; None where the module runs never or several times.
        """
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


def read_stage_table(model: nn.Module) -> list[StageEntry]:
    """Read timm's `feature_info` of a model.

    Args:
        model: Any model; the first module in it that has a table is taken, as a model may be in a
            wrapper.

    Returns:
        Its rows, with names of modules as the outer model has them; empty for other libraries.
    """
    for prefix, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        rows = getattr(info, "info", info)
        if not isinstance(rows, (list, tuple)) or not rows:
            continue
        if all(isinstance(row, dict) for row in rows):
            start = f"{prefix}." if prefix else ""
            return [_stage_entry(row, start) for row in rows]
    return []


def _stage_entry(row: dict[str, Any], start: str) -> StageEntry:
    entry = StageEntry(module=start + (row.get("module") or ""))
    if row.get("num_chs") is not None:
        entry["num_chs"] = row["num_chs"]
    if row.get("reduction") is not None:
        entry["reduction"] = row["reduction"]
    return entry
