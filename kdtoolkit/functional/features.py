"""Losses between features of student and teacher, and the maps and matrices that they compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32
from kdtoolkit.utils.validation import check_number, describe_value

MAXIMUM = "max"  # option `p` of attention
MAX_POWER = 64  # beyond, powers overflow in float32


def fitnet(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared difference of the student's regressed feature map and the teacher's.

    Source: Romero et al. 2015, "FitNets: Hints for thin deep nets". The regressor is
    `kdtoolkit.losses.fitnet.Regressor`.

    Args:
        student_features: Feature of the student after the regressor, usually (B, C, H, W).
        teacher_features: Feature of the teacher, of the same shape.

    Returns:
        Scalar.

    Raises:
        ValueError: If the shapes differ.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"hint losses compare equal shapes, got {tuple(student_features.shape)} and "
            f"{tuple(teacher_features.shape)}: put an Adapter on the student's feature"
        )
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features))


def smaller_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two feature maps to the smaller height and the smaller width of the two.

    Args:
        a: Feature map (B, C, H, W).
        b: Feature map (B, C', H', W').

    Returns:
        Both maps, with one height and one width.

    Raises:
        ValueError: If one has no height and width.
    """
    for feature in (a, b):
        if feature.dim() != 4:
            raise ValueError(
                f"feature maps (B, C, H, W) are pooled to one grid, got {tuple(feature.shape)}"
            )
    grid = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, grid), _pooled(b, grid)


def _pooled(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(feature.shape[2:]) == grid:
        return feature
    return F.adaptive_avg_pool2d(feature, grid)


def attention(feature: Tensor, *, p: float | str = 2.0) -> Tensor:
    """Spatial attention of a feature map: the channel mean of f^p, flattened, with unit length.

    A whole `p` is the power itself, with its sign where p is odd, as in published code; any other
    `p` is a power of |f|. `p="max"` is the paper's maximum, max_c |f_c| (its F_max^1): at each
    position only the strongest channel counts.

    Source: Zagoruyko & Komodakis 2017, "Paying more attention to attention".

    Args:
        feature: Feature map f, (B, C, H, W).
        p: The power, above 0, or "max".

    Returns:
        Attention maps (B, H * W).

    Raises:
        ValueError: For another `p`, or a feature without height and width.
    """
    check_attention_power(p)
    x = at_least_float32(feature)
    if x.dim() != 4:
        raise ValueError(f"attention is read from a feature map (B, C, H, W), got {tuple(x.shape)}")
    if isinstance(p, str):
        collapsed = x.abs().amax(1)
    else:
        collapsed = (x if float(p).is_integer() else x.abs()).pow(p).mean(1)
    return F.normalize(collapsed.flatten(1), dim=1)


def check_attention_power(p: object, minimum: float = 0.0) -> None:
    """Check the option `p` of attention.

    Args:
        p: What was given.
        minimum: Smallest power; 0 itself is never allowed.

    Raises:
        ValueError: If it is neither a power nor "max".
    """
    if isinstance(p, str) and p == MAXIMUM:
        return
    meaning = f"the power of attention; or {MAXIMUM!r}, the maximum over channels"
    check_number("p", p, minimum=minimum, maximum=MAX_POWER, above=0, meaning=meaning)


def at(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    p: float | str = 2.0,
) -> Tensor:
    """Sum over taps of the mean squared difference of `attention` maps.

    Grids of different sizes are matched by `smaller_grid`.

    Source: Zagoruyko & Komodakis 2017, "Paying more attention to attention".

    Args:
        student_features: One feature map (B, C, H, W) for each tap.
        teacher_features: As many feature maps; channels and grids may differ.
        p: The power of the attention maps, above 0, or "max".

    Returns:
        Scalar.

    Raises:
        ValueError: If the numbers of features differ or are 0, or one is no list of feature maps.
    """
    _check_same_number(student_features, teacher_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for student, teacher in zip(student_features, teacher_features, strict=True):
        s, t = smaller_grid(at_least_float32(student), at_least_float32(teacher))
        loss = loss + F.mse_loss(attention(s, p=p), attention(t, p=p))
    return loss


def sp(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Sum over taps of ||G_t - G_s||_F^2 / B^2, where G are the `similarities` of the samples.

    Source: Tung & Mori 2019, "Similarity-preserving knowledge distillation".

    Args:
        student_features: One feature (B, ...) for each tap.
        teacher_features: As many features (B, ...), of any shapes.

    Returns:
        Scalar.

    Raises:
        ValueError: If the numbers of features differ or are 0.
    """
    _check_same_number(student_features, teacher_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for s, t in zip(student_features, teacher_features, strict=True):
        loss = loss + (similarities(t) - similarities(s)).square().sum() / len(s) ** 2
    return loss


def similarities(feature: Tensor) -> Tensor:
    """Gram matrix of the flattened samples, each row with unit length.

    It is never computed in half precision, under autocast neither.

    Args:
        feature: Feature (B, ...).

    Returns:
        Matrix (B, B).
    """
    with torch.autocast(feature.device.type, enabled=False):
        rows = at_least_float32(feature).flatten(1)
        return F.normalize(rows @ rows.T, dim=1)


def srkd(student_features: Sequence[Tensor], reset_features: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the mean squared difference of the student's and the reset stage's output.

    Source: Chen & Sun 2024, "Design and simulation of stage reset knowledge distillation method".

    Args:
        student_features: Output of each of the student's stages, after its adapter.
        reset_features: Output of each of the teacher's stages, run on the student's output of the
            stage before; of the same shapes.

    Returns:
        Scalar.

    Raises:
        ValueError: If the numbers of features differ or are 0, or two shapes differ.
    """
    _check_same_number(student_features, reset_features)
    loss = at_least_float32(student_features[0]).new_zeros(())
    for s, t in zip(student_features, reset_features, strict=True):
        loss = loss + fitnet(s, t)
    return loss


def _check_same_number(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    for side, features in (("student", students), ("teacher", teachers)):
        if isinstance(features, Tensor):
            raise ValueError(
                f"{side}_features is one tensor {tuple(features.shape)}; allowed: a list of "
                "features, one for each tap: put it in a list, [feature]"
            )
        if not isinstance(features, (list, tuple)):
            raise ValueError(
                f"{side}_features is {describe_value(features)}; allowed: a list of features, one "
                "for each tap"
            )
        for feature in features:
            if not isinstance(feature, Tensor):
                raise ValueError(
                    f"{side}_features holds {describe_value(feature)}; allowed: tensors"
                )
    if len(students) != len(teachers) or not students:
        raise ValueError(
            "as many student features as teacher features are compared, got "
            f"{len(students)} and {len(teachers)}"
        )
