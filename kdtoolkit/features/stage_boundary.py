"""The boundary between two stages of a network: the tensors that leave one and enter the next."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kdtoolkit.features.autograd_graph import GraphValue
from kdtoolkit.types import Shape


@dataclass(frozen=True)
class BoundaryTensor:
    """One tensor at the end of a stage.

    Attributes:
        module: Name of the module that returns it.
        path: Where it stands in what the module returns: "" for all of it, "[1]" in a tuple.
        leaf_index: The same as its place among the leaves of the output, a pytree.
        shape: Its shape, without the batch.
        value: Its place in the autograd graph of the traced forward.
        returned_at: When the module returned, in the order of all calls and returns.
        is_read: Whether something later reads it; what nothing reads is not replaced.
        consumers: Names of modules. Where there are some, the tensor is replaced among their
            arguments, and not where it is returned.
    """

    module: str
    path: str
    leaf_index: int
    shape: Shape
    value: GraphValue
    returned_at: int
    is_read: bool = True
    consumers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tensor as one writes it as a tap: "stage2", "stage2[1]"."""
        return self.module + self.path


@dataclass(frozen=True)
class StageBoundary:
    """The end of one stage.

    Attributes:
        tensors: The tensors that leave the stage.
        main_index: Which of them is the stage's feature.
        stride: Image height over the height of the feature's grid.
        replaceable: Whether every path from the image to the logits passes these tensors, so that
            the next stage can be reset by replacing them.
        overwritten: Whether something later writes into one of the tensors in place.
    """

    tensors: tuple[BoundaryTensor, ...]
    main_index: int
    stride: float
    replaceable: bool
    overwritten: bool = False

    @cached_property
    def returned_at(self) -> int:
        """When the last of its modules returned."""
        return max(tensor.returned_at for tensor in self.tensors)

    @property
    def main(self) -> BoundaryTensor:
        """The tensor that is the stage's feature."""
        return self.tensors[self.main_index]

    @property
    def name(self) -> str:
        """The stage's feature as one writes it as a tap."""
        return self.main.name

    @property
    def shape(self) -> Shape:
        """Shape of the stage's feature, without the batch."""
        return self.main.shape

    @property
    def read_tensors(self) -> list[BoundaryTensor]:
        """What has to be replaced to reset the next stage."""
        return [tensor for tensor in self.tensors if tensor.is_read]

    @property
    def read_indices(self) -> list[int]:
        """Where these stand among all tensors of the boundary."""
        return [index for index, tensor in enumerate(self.tensors) if tensor.is_read]

    @property
    def values(self) -> list[GraphValue]:
        """Places of all tensors in the autograd graph."""
        return [tensor.value for tensor in self.tensors]


def split_tap_name(name: str) -> tuple[str, str]:
    """Split a tap into module and path: "stage2[1]" -> ("stage2", "[1]").

    Args:
        name: A tap as one writes it.

    Returns:
        Name of the module, and the path with its brackets, "" where there is none.
    """
    module, bracket, rest = name.partition("[")
    return module, bracket + rest
