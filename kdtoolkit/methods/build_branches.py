"""Builds the branches of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.branch_join import BranchJoin
from kdtoolkit.methods.branches import Branches, check_num_branches
from kdtoolkit.methods.network_checks import have_equal_values
from kdtoolkit.models.network_cut import cut_network, resolve_cut, tail_parameters
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.types import LossWeight, TapKey


def build_branches(
    inputs: StrategyInputs,
    make_join: Callable[[Taps, TapKey], BranchJoin],
    *,
    branches: int,
    cut: TapKey = "auto",
    weights: Mapping[str, LossWeight],
    views: bool = False,
    share_gradient: bool = False,
    best: bool = True,
) -> Branches:
    """Build the branches of a strategy.

    Args:
        inputs: The student, and what builds further networks.
        make_join: Makes the join from the student's taps and the cut.
        branches: How many branches, the student among them, from 2.
        cut: Number of a stage, or name of a module, behind which they part; "auto" is the last
            boundary in front of the last stage.
        weights: Weight of "ce" and of each term of the join.
        views: Whether every branch has its own augmentation of an image.
        share_gradient: Whether the gradient that enters the trunk is divided by their number.
        best: Whether the best branch is exported; False exports the student.

    Returns:
        The method.

    Raises:
        ValueError: For fewer than two branches, or where the network cannot be cut.
    """
    check_num_branches(branches)
    cut = resolve_cut(inputs.student, cut)
    parts = cut_network(inputs.student, cut)
    networks = [inputs.student.model]
    for k in range(1, branches):
        network = inputs.make_network(k)
        own = tail_parameters(network, parts)
        if any(have_equal_values(tail_parameters(other, parts), own) for other in networks):
            network = reinitialised_copy(network, k)  # all were loaded with the same weights
        networks.append(network)
    return Branches(
        networks,
        cut=cut,
        join=make_join(inputs.student, cut),
        weights=weights,
        views=views,
        share_gradient=share_gradient,
        image=inputs.image,
        preprocess=inputs.preprocess,
        best=best,
    )
