"""Checks while training: losses and weights are finite, gradients reach every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdtoolkit.core.method import Method
from kdtoolkit.trainer.loss_tracker import LossTracker
from kdtoolkit.utils import checkpoint

MAX_NAMES = 5  # parameters that an error message names


class NonFiniteLoss(RuntimeError):
    """A loss term or a weight became nan or infinite."""


class NonFiniteValue(NamedTuple):
    """What is not finite.

    Attributes:
        description: Which number, and at which step.
        remedy: What to lower, beside the learning rate.
    """

    description: str
    remedy: str


def find_non_finite_loss(
    losses: LossTracker, owners: Mapping[str, str] | None = None
) -> NonFiniteValue | None:
    """The first loss term that was nan or infinite, or None.

    Args:
        losses: The losses of the run so far.
        owners: What returned a term, such as "the callback Mine", by the term; not of all terms.

    Returns:
        The term, its step and what to lower; or None.
    """
    found = losses.first_non_finite()
    if found is None:
        return None
    step, name = found
    by = f", which {owners[name]} returns" if owners and name in owners else ""
    return NonFiniteValue(
        f"the loss term {name!r} is not finite at step {step}", f"the weight of this term{by}"
    )


def find_non_finite_weight(method: Method, step: int) -> NonFiniteValue | None:
    """The first parameter with a value that is nan or infinite, or None.

    The device is asked once where all are finite.

    Args:
        method: Its parameters are looked at.
        step: Batches since the start, for the description.
    """
    parameters = {name: p.detach() for name, p in method.named_parameters()}
    if not parameters or bool(torch.stack([p.isfinite().all() for p in parameters.values()]).all()):
        return None
    name = next(n for n, p in parameters.items() if not bool(p.isfinite().all()))
    return NonFiniteValue(
        f"the weight {name} is not finite after step {step}", "the weights of the losses"
    )


def non_finite_error(value: NonFiniteValue, epoch: int, output_dir: Path | None) -> NonFiniteLoss:
    """The error for a value that is not finite: where, which checkpoint is good, what to do.

    Args:
        value: What is not finite.
        epoch: Finished epochs.
        output_dir: Folder of the run.
    """
    good = "no checkpoint was written yet"
    last = output_dir / "checkpoints" / "last" if output_dir is not None else None
    if last is not None and last.exists():
        position = checkpoint.describe_position(checkpoint.read_metadata(last))
        good = f"the last good checkpoint is {last} ({position})"
    return NonFiniteLoss(
        f"{value.description} (epoch {epoch}); {good}. Lower lr or {value.remedy}, warm up, "
        "clip gradients (grad_clip=5.0), or use mixed_precision='no'"
    )


def check_first_gradients(
    method: Method, losses: Mapping[str, Tensor], owners: Mapping[str, str] | None = None
) -> None:
    """Check after the first backward pass that losses and trained parameters reach each other.

    Args:
        method: The method, whose gradients are there.
        losses: The losses of the batch by name.
        owners: What returned a loss, such as "the callback Mine", by the loss; not of all losses.

    Raises:
        RuntimeError: If a loss depends on no trained parameter, or a trained parameter got no
            gradient.
    """
    constant = [name for name, loss in losses.items() if not loss.requires_grad]
    # a process that trains some of the networks has losses of the others, which are constant there
    may_be_constant = method.networks_per_process and len(constant) < len(losses)
    if constant and not may_be_constant:
        by = f" of {owners[constant[0]]}" if owners and constant[0] in owners else ""
        raise RuntimeError(
            f"the loss {constant[0]!r}{by} reaches no trained parameter: what it reads is frozen "
            "or detached. Freeze less, or leave it out"
        )
    trained = method.trainable_parameters()
    missing = [name for name, p in trained.items() if p.requires_grad and p.grad is None]
    if missing:
        names = ", ".join(missing[:MAX_NAMES])
        if len(missing) > MAX_NAMES:
            names += f" and {len(missing) - MAX_NAMES} more"
        raise RuntimeError(
            f"no gradient reached {names} in the first batch: no loss depends on them. "
            "Freeze them with requires_grad_(False), or add a loss that reads what they make"
        )
