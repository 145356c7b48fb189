"""State dicts: take them out of a checkpoint, convert them, compare them with a network."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import model_entrypoint
from torch import Tensor, nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg

# Keys under which a checkpoint holds its state dict, the preferred one first: averaged weights are
# those that training scripts evaluate
CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "student",
    "teacher",
    "network",
    "net",
    "backbone",
    "encoder",
    "module",
    "weights",
    "params",
)
# Buffers that a network computes from its structure when it is built, and counters: they may be
# missing, and timm's own files lack them
RECOMPUTED_BUFFERS = (
    "num_batches_tracked",
    "attn_mask",
    "relative_position_index",
    "relative_coords_table",
    "attention_bias_idxs",
    "total_ops",  # of profilers
    "total_params",
    "n_averaged",
)
WRAPPER_PREFIXES = ("_orig_mod.module.", "module.", "_orig_mod.")  # torch.compile, DDP
WRAPPERS = ("_orig_mod", "module", "model", "student", "teacher", "network", "net", "backbone")


@dataclass
class StateDictMatch:
    """How a state dict matches a network.

    Attributes:
        state: The tensors that match in name and shape.
        missing: Names that only the network has, without `RECOMPUTED_BUFFERS`.
        unexpected: Names that only the state dict has.
        mismatched: Name -> both shapes, in words, for tensors of another shape.
    """

    state: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str]

    def __str__(self) -> str:
        total = len(self.state) + len(self.missing) + len(self.mismatched)
        rest = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of other shape": list(self.mismatched.values()),
        }
        parts = [f"{kind}: {shorten_list(names)}" for kind, names in rest.items()]
        return f"{len(self.state)} of {total} tensors matched; {'; '.join(parts)}"


def match_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> StateDictMatch:
    """Compare a state dict with a network, by names and shapes.

    Args:
        model: The network; its parameters may be on the meta device.
        state: The state dict.

    Returns:
        What matches, and what does not.
    """
    own = model.state_dict()
    mismatched = {
        key: f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    }
    matching = {k: v for k, v in state.items() if k in own and k not in mismatched}
    missing = [k for k in own if k not in state and not is_recomputed(k)]
    unexpected = [k for k in state if k not in own and not is_recomputed(k)]
    return StateDictMatch(matching, missing, unexpected, mismatched)


def is_recomputed(name: str) -> bool:
    """Tell whether a tensor is none of training, so that a state dict need not hold it.

    Args:
        name: Name of the tensor.

    Returns:
        True for `RECOMPUTED_BUFFERS`.
    """
    return name.rpartition(".")[2] in RECOMPUTED_BUFFERS


def shorten_list(names: Sequence[str], most: int = 4) -> str:
    """Write the first few of a list, for messages.

    Args:
        names: The list.
        most: How many to write.

    Returns:
        "a, b and 3 more"; "none" for an empty list.
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest


def convert_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict as timm does for the architecture of a network.

    timm's filter renames tensors of other code bases and resamples position tables and patch
    embeddings to the size of the network.

    Args:
        model: The network.
        state: The state dict.

    Returns:
        The converted state dict; the same one where all its names and shapes are the network's, or
        where timm has no filter for the architecture.
    """
    own = model.state_dict()
    convert = _find_filter(model)
    if convert is None or all(k in own and v.shape == own[k].shape for k, v in state.items()):
        return dict(state)
    return dict(convert(dict(state), model))


def _find_filter(model: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """The checkpoint_filter_fn of timm, in the file of the constructor or of the class."""
    names = [type(model).__module__]
    architecture = get_pretrained_cfg(model).get("architecture")
    if architecture:
        with contextlib.suppress(RuntimeError):  # not registered in this version of timm
            names.insert(0, model_entrypoint(architecture).__module__)
    for name in names:
        if not name.startswith("timm."):
            continue
        found: Callable[..., dict[str, Tensor]] | None = getattr(
            importlib.import_module(name), "checkpoint_filter_fn", None
        )
        if found:
            return found
    return None


def unwrap_state_dict(checkpoint: object, name: str) -> tuple[dict[str, Tensor], str | None]:
    """Take the tensors of a checkpoint out of their containers.

    Args:
        checkpoint: A state dict, or a mapping that holds one under "state_dict", "model" or a
            similar key.
        name: How messages call it, such as "student_weights".

    Returns:
        The state dict, and a sentence on which one was taken where there are several, else None.

    Raises:
        ValueError: If there are no tensors in it.
    """
    content: Any = checkpoint
    note = None
    while isinstance(content, Mapping):
        held = [key for key in CONTAINERS if _holds_more(content.get(key))]
        if not held:
            break
        if len(held) > 1:
            note = f"{held[0]!r} is taken, not {', '.join(map(repr, held[1:]))}"
        content = content[held[0]]
    entries = content if isinstance(content, Mapping) else {}
    tensors = {str(k): v for k, v in entries.items() if isinstance(v, Tensor)}
    if not tensors:
        is_mapping = isinstance(content, Mapping)
        found = shorten_list([str(k) for k in entries]) if is_mapping else type(content).__name__
        raise ValueError(
            f"{name}: no tensors are in it, but {found}; allowed: a state dict, or one under "
            f"{', '.join(map(repr, CONTAINERS))}"
        )
    return tensors, note


def _holds_more(value: object) -> bool:
    """Whether a value is a mapping of tensors, or of such mappings."""
    return isinstance(value, Mapping) and any(
        isinstance(entry, (Tensor, Mapping)) for entry in value.values()
    )


def strip_prefix(state: Mapping[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Remove a common prefix ("module.", "student.") from the names of a state dict.

    Args:
        state: The state dict.
        own: Names that the network has.

    Returns:
        The part of `state` with the prefix that makes most names those of the network, without this
        prefix; the others lose as much of it as they have. Names of another code base only lose
        "module." and "_orig_mod.".
    """

    def num_known(prefix: str) -> int:
        return sum(k.startswith(prefix) and k.removeprefix(prefix) in own for k in state)

    best = max(_all_prefixes(state), key=lambda prefix: (num_known(prefix), -len(prefix)))
    if num_known(best) == 0:  # names of another code base, which timm's filter may know
        common = [p for p in WRAPPER_PREFIXES if all(k.startswith(p) for k in state)]
        best = common[0] if common else ""
    inside = {k.removeprefix(best): v for k, v in state.items() if k.startswith(best)}
    outside = {_without_start(k, best): v for k, v in state.items() if not k.startswith(best)}
    return {k: v for k, v in outside.items() if k in own} | inside | _linear_layers(outside)


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove beginnings that all names share and that training scripts add.

    Args:
        state: The state dict.

    Returns:
        The state dict without them.
    """
    found = dict(state)
    while found:
        first = {key.partition(".")[0] for key in found}
        if len(first) != 1 or not first <= set(WRAPPERS):
            break
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found


def _without_start(name: str, prefix: str) -> str:
    """A name without the parts that it shares with a prefix: "module.fc" of "module.encoder."."""
    parts, start = name.split("."), prefix.split(".")
    shared = 0
    while shared < len(parts) - 1 and parts[shared] == start[shared]:
        shared += 1
    return ".".join(parts[shared:])


def _linear_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (rows, columns) and their biases, among which the classifier may be."""
    stems = [k.removesuffix("weight") for k, v in state.items() if k.endswith("weight")]
    stems = [stem for stem in stems if state[f"{stem}weight"].dim() == 2]
    return {k: v for k, v in state.items() if k.rpartition(".")[0] + "." in stems}


def _all_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Every beginning of a name that ends with a dot, and the empty one."""
    prefixes = [""]
    for key in state:
        prefixes += [key[: i + 1] for i, character in enumerate(key) if character == "."]
    return list(dict.fromkeys(prefixes))
