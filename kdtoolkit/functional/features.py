"""Losses between feature maps of student and teacher, and the maps and matrices they compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32


def fitnet(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of the regressed student map and the teacher's, equal shapes (B, C, H, W).

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets"; the regressor is `objectives.fitnet.Regressor`.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"hint losses compare equal shapes, got {tuple(student_features.shape)} and "
            f"{tuple(teacher_features.shape)}: put an Adapter on the student's feature"
        )
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features))


def smaller_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (B, C, H, W) average-pooled to the smaller height and width of the two."""
    grid = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    a, b = (f if tuple(f.shape[2:]) == grid else F.adaptive_avg_pool2d(f, grid) for f in (a, b))
    return a, b


def attention(feature: Tensor, *, p: float = 2.0) -> Tensor:
    """Spatial attention of a map (B, C, H, W): channel mean of f^p, flattened, unit length. (B, H * W)

    For whole p it is the power itself, with its sign where p is odd, as published code has it; else of |f|.
    """
    feature = (
        at_least_float32(feature) if float(p).is_integer() else at_least_float32(feature).abs()
    )
    return F.normalize(feature.pow(p).mean(1).flatten(1), dim=1)


def at(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, p: float = 2.0
) -> Tensor:
    """Sum over taps of the mean squared difference of attention maps; each map (B, C, H, W), channels may differ.

    Zagoruyko & Komodakis 2017, "Paying More Attention to Attention"; sizes are matched by average pooling.
    """
    _same_number(student_features, teacher_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for s, t in zip(student_features, teacher_features, strict=True):
        s, t = smaller_grid(at_least_float32(s), at_least_float32(t))
        loss = loss + F.mse_loss(attention(s, p=p), attention(t, p=p))
    return loss


def sp(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Sum over taps of ||G_t - G_s||_F^2 / B^2, G the row-normalised Gram matrix (B, B) of flattened features.

    Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation". Features (B, ...), any shapes.
    """
    _same_number(student_features, teacher_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for s, t in zip(student_features, teacher_features, strict=True):
        loss = loss + (similarities(t) - similarities(s)).square().sum() / len(s) ** 2
    return loss


def similarities(feature: Tensor) -> Tensor:
    """Row-normalised Gram matrix (B, B) of features (B, ...), never in half precision, not under autocast either."""
    with torch.autocast(feature.device.type, enabled=False):
        rows = at_least_float32(feature).flatten(1)
        return F.normalize(rows @ rows.T, dim=1)


def srkd(student_features: Sequence[Tensor], reset_features: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the mean squared difference of the student's stage output and the teacher's stage run on
    the student's previous output; equal shapes per stage.

    Chen & Sun 2024, "Design and Simulation of Stage Reset Knowledge Distillation Method".
    """
    _same_number(student_features, reset_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for s, t in zip(student_features, reset_features, strict=True):
        loss = loss + fitnet(s, t)
    return loss


def _same_number(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"as many student features as teacher features are compared, got {len(students)} and {len(teachers)}"
        )
