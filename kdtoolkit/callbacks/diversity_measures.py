"""How different networks are, by their weights and by their logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit import functional


@torch.no_grad()
def measure_batch(
    students: Sequence[Tensor], labels: Tensor, teachers: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Measure how different networks are on one batch.

    Args:
        students: Logits (B, C) of each network.
        labels: Class ids (B,); -1 for rows without a label.
        teachers: Logits (B, C) of the teacher of each network; compared is then a network with the
            teacher of another (a single network with its own), otherwise one network with another.

    Returns:
        Means over pairs, scalar tensors: "disagreement" and "errors" in percent, "kl" and "ce"
        without a unit.
    """
    others, numbers = students if teachers is None else teachers, range(len(students))
    pairs = [(i, j) for i in numbers for j in numbers if i != j] or [(0, 0)]
    labelled = labels >= 0
    count = labelled.sum().clamp(min=1)
    differing = [(students[i].argmax(1) != others[j].argmax(1)).float().mean() for i, j in pairs]
    kl = [functional.kd(students[i], others[j], temperature=1.0) for i, j in pairs]
    errors = [((z.argmax(1) != labels) & labelled).sum() / count for z in students]
    targets = labels.where(labelled, -100)
    ce = [
        F.cross_entropy(z.float(), targets, ignore_index=-100, reduction="sum") / count
        for z in students
    ]
    return {
        "disagreement": 100 * torch.stack(differing).mean(),
        "errors": 100 * torch.stack(errors).mean(),
        "kl": torch.stack(kl).mean(),
        "ce": torch.stack(ce).mean(),
    }


def have_same_architecture(nets: Sequence[nn.Module]) -> bool:
    """Whether all networks have parameters of the same names and shapes.

    Args:
        nets: The networks, at least one.

    Returns:
        True if they agree, in the order of the parameters too; buffers are not compared.
    """
    return len({tuple((n, tuple(p.shape)) for n, p in net.named_parameters()) for net in nets}) == 1


@torch.no_grad()
def weight_distance(nets: Sequence[nn.Module]) -> float:
    """Mean over pairs of |w_i - w_j| / |w|, no unit.

    Args:
        nets: Two networks or more of one architecture.
    """
    flat = [torch.cat([p.detach().float().flatten() for p in net.parameters()]) for net in nets]
    size = sum(w.norm() for w in flat) / len(flat)
    pairs = list(combinations(flat, 2))
    return float(sum((a - b).norm() for a, b in pairs) / len(pairs) / size)
