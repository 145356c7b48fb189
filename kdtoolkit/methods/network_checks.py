"""Checks of networks that are trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kdtoolkit.data.options import MAX_IMAGE_SIZE
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.network_cut import Cut, tail_parameters
from kdtoolkit.utils.validation import describe_value

Parameters = Mapping[str, nn.Parameter]


def list_networks(owner: str, networks: object) -> list[nn.Module]:
    """Networks that were given, as a list of modules.

    Args:
        owner: Name of the method, for the message.
        networks: A list or tuple of modules.

    Returns:
        A new list.

    Raises:
        ValueError: If it is no list, or holds what is no module.
    """
    if isinstance(networks, nn.ModuleList):
        return list(networks)
    if not isinstance(networks, (list, tuple)):
        raise ValueError(
            f"{owner} got {type(networks).__name__}; allowed: a list of networks, {owner}([a, b])"
        )
    for network in networks:
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"{owner} got {describe_value(network)} as a network; allowed: modules "
                "(nn.Module); only distill() builds by name"
            )
    return list(networks)


def check_inputs(owner: str, preprocess: object, image: object) -> None:
    """Check the options of a method that say what its networks see.

    Args:
        owner: Name of the method, for the message.
        preprocess: Input normalisation, or None.
        image: Height and width of the data in pixels, or None.

    Raises:
        ValueError: If one has another type.
    """
    if not isinstance(preprocess, (Preprocess, type(None))):
        raise ValueError(
            f"preprocess of {owner} is {describe_value(preprocess)}; allowed: a "
            "kdtoolkit.Preprocess, or None"
        )
    sides = (image, image) if type(image) is int else image
    pixels = list(sides) if isinstance(sides, (list, tuple)) else []
    if image is not None and not (
        len(pixels) == 2 and all(type(s) is int and 0 < s <= MAX_IMAGE_SIZE for s in pixels)
    ):
        raise ValueError(
            f"image of {owner} is {describe_value(image)}; allowed: (height, width) of the data "
            "in pixels, or None"
        )


def check_tapped(owner: str, name: str, network: object) -> None:
    """Check that a network was given with its taps.

    Args:
        owner: Name of the method, for the message.
        name: "student" or "teacher".
        network: What was given.

    Raises:
        ValueError: If it is no `Taps`.
    """
    if not isinstance(network, Taps):
        kind = "Frozen" if name == "teacher" else "Taps"
        raise ValueError(
            f"{owner} got {describe_value(network)} as {name}; allowed: {kind}(network, taps, "
            "image size)"
        )


def check_separate_parameters(networks: Sequence[nn.Module]) -> None:
    """Check that no two networks have a parameter in common.

    Args:
        networks: Networks of one method.

    Raises:
        ValueError: If they do, with the number of the later network.
    """
    seen: set[int] = set()
    for number, network in enumerate(networks):
        own = {id(p) for p in network.parameters()}
        if own & seen:
            raise ValueError(
                f"network {number} of Peers has parameters in common with an earlier one: each "
                "must have its own weights, build it again or use copy.deepcopy and other initial "
                "weights"
            )
        seen |= own


def check_same_architecture(networks: Sequence[nn.Module]) -> None:
    """Check that two networks or more have one class and parameters of equal names and shapes.

    Args:
        networks: Networks that will share a trunk.

    Raises:
        ValueError: If there are fewer than two, or one differs from the first.
    """
    if len(networks) < 2:
        raise ValueError(
            f"Branches of {len(networks)} networks: give two or more of one architecture"
        )
    first = networks[0]
    for number, network in enumerate(networks):
        if type(network) is type(first) and parameter_shapes(network) == parameter_shapes(first):
            continue
        raise ValueError(
            f"network {number} of Branches ({type(network).__name__}) has other parameters than "
            f"the first ({type(first).__name__}): branches share a trunk and need one "
            "architecture; use Peers"
        )


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by name.

    Args:
        network: Any module.

    Returns:
        Name -> shape, in the order of the network.
    """
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def have_equal_values(first: Parameters, second: Parameters) -> bool:
    """Whether two networks have parameters of equal names and values.

    Args:
        first: Parameters by name.
        second: Those of another network.

    Returns:
        False also where there are none, or where they have no values (on the meta device).
    """
    if not first or first.keys() != second.keys():
        return False
    return all(not p.is_meta and torch.equal(p, second[name]) for name, p in first.items())


def find_equal_pair(networks: Sequence[Parameters]) -> tuple[int, int] | None:
    """Numbers of the first two networks whose parameters are equal, the lower first, or None.

    Args:
        networks: Parameters by name, of every network.

    Returns:
        The two numbers, from 0; None where no two are equal.
    """
    for number, parameters in enumerate(networks):
        for other in range(number):
            if have_equal_values(networks[other], parameters):
                return other, number
    return None


def check_different_weights(networks: Sequence[nn.Module]) -> None:
    """Check that no two networks have equal weights.

    Args:
        networks: Networks that see the same images.

    Raises:
        ValueError: If two have: they would stay equal.
    """
    pair = find_equal_pair([dict(net.named_parameters()) for net in networks])
    if pair is not None:
        raise ValueError(
            f"networks {pair[0]} and {pair[1]} of Peers have equal initial weights, and would stay "
            "equal on the same images: pass batches='own', views=True, redraw='head' (a number of "
            "peers by distill()), networks without loaded weights, or other networks (peers=[...]; "
            "in your own code "
            "kdtoolkit.models.reinit.reinitialised_copy(net, seed) re-initialises weights)"
        )


def check_different_tails(networks: Sequence[nn.Module], parts: Cut) -> None:
    """Check that no two networks have equal weights behind a cut.

    Args:
        networks: Networks of one architecture.
        parts: The cut.

    Raises:
        ValueError: If two have, or if nothing lies behind the cut.
    """
    parameters = [tail_parameters(network, parts) for network in networks]
    if not parameters[0]:
        raise ValueError(
            "nothing that is trained lies behind the cut: choose a stage in front of the classifier"
        )
    pair = find_equal_pair(parameters)
    if pair is not None:
        raise ValueError(
            f"networks {pair[0]} and {pair[1]} of Branches have equal weights behind the cut, and "
            "would stay equal: re-initialise them, for instance with "
            "kdtoolkit.models.reinit.reinitialised_copy(net, seed)"
        )
