"""What draws the rows of a user's DataLoader, as a checkpoint holds it: generators and counters.

A resumed run then draws the rows that it would have drawn. torch's global generator is not part of
it: the trainer seeds it by epoch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kdtoolkit.data.dataset import Split
from kdtoolkit.data.stream import StreamDataset
from kdtoolkit.data.tables import has_fixed_items
from kdtoolkit.data.user_loader import CountedIterable, IndexedDataset

MAX_DEPTH = 4  # objects inside objects that are looked into
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
NUMPY, PYTHON = "numpy's global generator", "Python's global generator"
State = dict[str, Any]


class Kept(NamedTuple):
    """Something that an object keeps from one epoch to the next.

    Attributes:
        place: Where it is, such as "sampler.generator".
        owner: The object.
        name: Its attribute; "" for the object itself, which has a `state_dict`.
    """

    place: str
    owner: Any
    name: str


class SamplerState:
    """The state of what draws the training rows, where that is the user's.

    Args:
        split: The training split.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self._own_class = _own_sampler(split) is not None
        self._at_first = self._read()
        self._at_epoch_start = self._at_first

    def start_epoch(self) -> None:
        """Remember the state from which the rows of an epoch are drawn."""
        self._at_epoch_start = self._read()

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the state after a block that draws rows."""
        before = self._read()
        try:
            yield
        finally:
            self.load_state_dict(before)

    def state_dict(self, in_epoch: bool) -> State:
        """Return what a checkpoint holds.

        Args:
            in_epoch: Whether an epoch has begun and is not over: it is drawn again from its start.

        Returns:
            Place -> state. Numbers that are as they were at first are left out: they are settings.
        """
        found = self._at_epoch_start if in_epoch else self._read()
        first = self._at_first
        return {
            place: value
            for place, value in found.items()
            if not (isinstance(value, (bool, int, float)) and first.get(place) == value)
        }

    def load_state_dict(self, state: State) -> None:
        """Put a state back.

        Args:
            state: What `state_dict` returned; places that are not there any more are left out.
        """
        for place, owner, name in list(_kept(self.split)):
            if place not in state:
                continue
            if not name:
                owner.load_state_dict(state[place])
            elif isinstance(getattr(owner, name), GENERATORS):
                _set_state(getattr(owner, name), state[place])
            else:
                setattr(owner, name, state[place])
        if NUMPY in state:
            np.random.set_state(state[NUMPY])
        if PYTHON in state:
            random.setstate(state[PYTHON])

    def _read(self) -> State:
        found: State = {}
        for place, owner, name in _kept(self.split):
            value = getattr(owner, name) if name else owner.state_dict()
            found[place] = _state_of(value) if isinstance(value, GENERATORS) else value
        if self._own_class:  # it may draw from these
            found |= {NUMPY: np.random.get_state(legacy=False), PYTHON: random.getstate()}
        return found


def describe_inexact(split: Split) -> list[str]:
    """Say what of a user's DataLoader a checkpoint cannot hold.

    Args:
        split: The training split.

    Returns:
        Sentences; none where a resumed run gets the same batches.
    """
    loader, dataset = split.user_loader, split.dataset
    if loader is None:
        return []
    notes = []
    own = _own_sampler(split)
    if own is not None and not _has_state_dict(own):
        notes.append(
            f"the DataLoader's {type(own).__name__} is no sampler of torch: a checkpoint holds its "
            "random generators and numbers, and not what else it may keep between epochs"
        )
    inner = dataset.dataset if isinstance(dataset, IndexedDataset | CountedIterable) else dataset
    is_read_again = isinstance(inner, IterableDataset) and loader.num_workers == 0
    generators = [k.place for k in _walk("data set", inner, False) if _is_generator(k)]
    if generators and not is_read_again:
        notes.append(
            f"the DataLoader's data set has a random generator of its own ({generators[0]}), which "
            "no checkpoint holds: a resumed run cannot be exact, its images get other random "
            "changes; use torch's global generator in its place"
        )
    elif not is_read_again and not has_fixed_items(inner):
        notes.append(
            "what the DataLoader's data set draws at random is not part of a checkpoint: a run "
            "resumed within an epoch gets the same rows, with other random changes of the images"
        )
    return notes


def _kept(split: Split) -> Iterator[Kept]:
    """Every generator and counter behind the rows of a split."""
    loader, dataset = split.user_loader, split.dataset
    if isinstance(dataset, StreamDataset) and not dataset.is_hf:
        yield from _walk("stream", dataset.source)
    if loader is None:
        return
    if isinstance(loader.generator, torch.Generator):
        yield Kept("loader.generator", loader, "generator")
    seen: set[int] = set()
    for name in ("sampler", "batch_sampler"):
        yield from _walk(name, getattr(loader, name, None), seen=seen)
    if isinstance(dataset, CountedIterable) and loader.num_workers == 0:
        yield from _walk("data set", dataset.dataset)


def _walk(
    place: str, owner: object, numbers: bool = True, seen: set[int] | None = None
) -> Iterator[Kept]:
    """Generators and numbers among the attributes of an object, and of the objects inside it."""
    seen = set() if seen is None else seen
    if id(owner) in seen or place.count(".") >= MAX_DEPTH or not hasattr(owner, "__dict__"):
        return
    if isinstance(owner, (type, torch.Tensor, torch.nn.Module, DataLoader)):
        return
    seen.add(id(owner))
    if numbers and _has_state_dict(owner):
        yield Kept(place, owner, "")
        return
    numbers_count = numbers and not type(owner).__module__.startswith("torch.utils.data")
    for name, value in list(vars(owner).items()):
        kept = Kept(f"{place}.{name}", owner, name)
        if isinstance(value, GENERATORS) or (
            numbers_count and isinstance(value, (bool, int, float))
        ):
            yield kept
        elif not isinstance(value, Dataset):
            yield from _walk(kept.place, value, numbers, seen)


def _own_sampler(split: Split) -> object | None:
    """The sampler or batch sampler of the user's DataLoader that is not one of torch's."""
    loader = split.user_loader
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    for found in (batches, getattr(batches, "sampler", None), loader.sampler):
        if found is not None and not type(found).__module__.startswith(("torch.", "builtins")):
            return found
    return None


def _has_state_dict(owner: object) -> bool:
    return all(callable(getattr(owner, n, None)) for n in ("state_dict", "load_state_dict"))


def _is_generator(kept: Kept) -> bool:
    return isinstance(getattr(kept.owner, kept.name), GENERATORS)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)
