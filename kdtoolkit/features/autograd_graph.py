"""The autograd graph of one forward pass, read as the data-flow graph from the image to the logits.

Only the image requires grad during a traced forward, so every operation in the graph depends on it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node

GraphValue = tuple[Node, int]  # one tensor in the graph: an operation, and which of its outputs


def graph_value(tensor: Tensor) -> GraphValue | None:
    """The place of a tensor in the autograd graph; None for a tensor that no operation made.

    Args:
        tensor: Any tensor of the traced forward.

    Returns:
        The operation that made it, and which of the operation's outputs it is; or None.
    """
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def graph_values(tensors: Iterable[Tensor]) -> list[GraphValue]:
    """The places of those tensors that have one.

    Args:
        tensors: Tensors of the traced forward.

    Returns:
        Their places in the same order; tensors that no operation made are left out.
    """
    return [value for tensor in tensors if (value := graph_value(tensor)) is not None]


def is_reachable(
    outputs: Iterable[Tensor], leaf: Tensor, blocked: Collection[GraphValue] = ()
) -> bool:
    """Whether a path leads from a leaf to some outputs without passing certain values.

    Args:
        outputs: Where paths end.
        leaf: Where paths begin; a tensor that requires grad and was not computed.
        blocked: Values through which no path may go.
    """
    return any(_leaf_of(node) is leaf for node in iterate_operations(outputs, blocked))


def is_read(outputs: Sequence[Tensor], value: GraphValue, blocked: Collection[GraphValue]) -> bool:
    """Whether something between `blocked` values and the outputs reads a value, or it is an output.

    Args:
        outputs: Where paths end.
        value: The value in question.
        blocked: Values behind which nothing is looked at.
    """
    for node in iterate_operations(outputs, blocked):
        if any((parent, number) == value for parent, number in node.next_functions):
            return True
    return value in graph_values(outputs)


def source_leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from; the tensor itself where it is one.

    Args:
        tensor: Any tensor.

    Returns:
        Leaves that require grad, each once; empty where the tensor depends on none.
    """
    if tensor.grad_fn is None and tensor.requires_grad:
        return [tensor]
    leaves = [_leaf_of(node) for node in iterate_operations([tensor])]
    return list({id(leaf): leaf for leaf in leaves if leaf is not None}.values())


def iterate_operations(
    outputs: Iterable[Tensor], blocked: Collection[GraphValue] = ()
) -> Iterator[Node]:
    """Every operation that some outputs were computed by, back to the `blocked` values.

    Args:
        outputs: Where the way back begins.
        blocked: Values through which it does not go.

    Yields:
        The operations, each once; a leaf's node of the graph is among them.
    """
    todo = [value[0] for value in graph_values(outputs) if value not in blocked]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for parent, number in node.next_functions:
            if parent is not None and (parent, number) not in blocked and parent not in seen:
                seen.add(parent)
                todo.append(parent)


def count_readers(outputs: Iterable[Tensor]) -> Counter[GraphValue]:
    """How many operations read each value that the outputs were computed from.

    Args:
        outputs: Tensors that the forward ended in.

    Returns:
        Value -> number of times that operations read it; 0 for values that none reads.
    """
    readers: Counter[GraphValue] = Counter()
    for node in iterate_operations(outputs):
        for parent, number in node.next_functions:
            if parent is not None:
                readers[parent, number] += 1
    return readers


def find_dominators(outputs: Sequence[Tensor], leaf: Tensor) -> set[GraphValue]:
    """Values that lie on every path from a leaf to the outputs.

    Paths are counted exactly: a value through which as many paths go as there are is a dominator.
    Linear in the size of the graph.

    Args:
        outputs: Where paths end.
        leaf: Where paths begin; a tensor that requires grad and was not computed.

    Returns:
        The values; empty where no path leads from the leaf to the outputs.
    """
    roots = graph_values(outputs)
    order = _topological_order(roots)
    paths_from_leaf: dict[Node, int] = {}
    for node in order:
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        is_leaf = _leaf_of(node) is leaf
        paths_from_leaf[node] = 1 if is_leaf else sum(paths_from_leaf[p] for p in parents)

    paths_to_outputs: dict[Node, int] = defaultdict(int)
    paths_from_value: dict[GraphValue, int] = defaultdict(int)
    for root in roots:
        paths_to_outputs[root[0]] += 1
        paths_from_value[root] += 1
    for node in reversed(order):
        for parent, number in node.next_functions:
            if parent is not None and paths_to_outputs[node]:
                paths_to_outputs[parent] += paths_to_outputs[node]
                paths_from_value[parent, number] += paths_to_outputs[node]

    total = sum(paths_from_leaf[node] for node, _ in roots)
    if not total:
        return set()
    return {
        value
        for value, paths in paths_from_value.items()
        if paths * paths_from_leaf[value[0]] == total
    }


def _topological_order(roots: Iterable[GraphValue]) -> list[Node]:
    """The operations behind the roots, each after all that it reads."""
    order: list[Node] = []
    seen: set[Node] = set()
    todo = [(node, False) for node, _ in roots]
    while todo:
        node, is_finished = todo.pop()
        if is_finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            todo += [(parent, False) for parent in parents if parent not in seen]
    return order


def _leaf_of(node: Node) -> Tensor | None:
    """The leaf tensor that a node of the graph stands for, or None."""
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf
