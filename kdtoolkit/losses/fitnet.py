"""FitNet hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, arXiv 1412.6550).

Loss: mean over all elements of (R(f_s) - f_t)^2 at the hint stage; R is a convolution whose kernel
and stride take the student's grid to that of the teacher, then BatchNorm and ReLU; default weight
100.

Differs: one stage of training together with cross-entropy (the paper: two stages of training), as
in Tian et al. 2020. Where no such kernel fits (other ratios of sizes, tokens) an Adapter takes the
place of R.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss, check_pairs, shapes_of
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import RESIZES, Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, Shape, TapKey
from kdtoolkit.utils.validation import check_choice, describe_value, plain_scalar

MAX_KERNEL_SIZE = 16  # of a Regressor without stride; beyond, an Adapter has fewer weights


class Regressor(nn.Module):
    """Student feature map -> shape of the teacher's: convolution (with bias), BatchNorm, ReLU.

    Kernels of the paper's successors (Tian et al. 2020), with H_s and H_t rows (and likewise
    columns) of student and teacher:

    - H_s = 2 H_t: 3x3 with stride 2
    - 2 H_s = H_t: transposed 4x4 with stride 2
    - H_s >= H_t: 1 + H_s - H_t, without padding (1x1 for equal grids)

    Args:
        src: Shape of the student's feature, "NCHW".
        dst: Shape of the teacher's feature, "NCHW".
    """

    def __init__(self, src: Shape, dst: Shape) -> None:
        super().__init__()
        (h_s, w_s), (h_t, w_t) = src.grid, dst.grid
        self.conv: nn.Module
        if (h_s, w_s) == (2 * h_t, 2 * w_t):
            self.conv = nn.Conv2d(src.channels, dst.channels, 3, stride=2, padding=1)
        elif (2 * h_s, 2 * w_s) == (h_t, w_t):
            self.conv = nn.ConvTranspose2d(src.channels, dst.channels, 4, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(src.channels, dst.channels, (1 + h_s - h_t, 1 + w_s - w_t))
        self.bn = nn.BatchNorm2d(dst.channels)

    @staticmethod
    def fits(src: Shape, dst: Shape) -> bool:
        """Whether one of the kernels takes a feature from `src` to `dst`.

        Args:
            src: Shape of the student's feature.
            dst: Shape of the teacher's feature.

        Returns:
            True if both are "NCHW", and the teacher's grid is twice the student's, or not larger
            and fewer than `MAX_KERNEL_SIZE` rows smaller.
        """
        if not src.layout == dst.layout == "NCHW":
            return False
        (h_s, w_s), (h_t, w_t) = src.grid, dst.grid
        doubles = (2 * h_s, 2 * w_s) == (h_t, w_t)
        shrinks = h_s >= h_t and w_s >= w_t and 1 + h_s - h_t <= MAX_KERNEL_SIZE
        return doubles or shrinks

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C_s, H_s, W_s) -> (B, C_t, H_t, W_t)."""
        regressed: Tensor = self.bn(self.conv(feature))
        return regressed.relu()


@register_loss(
    "fitnet",
    losses={"ce": 1.0, "fitnet": 100.0},
    title="Hints from a middle stage (Romero et al. 2015)",
)
class FitNet(DistillationLoss):
    """Hints: the student regresses the teacher's feature of a middle stage.

    Args:
        student: The tapped student.
        teacher: The frozen teacher.
        pairs: (student tap, teacher tap) of every pair of features.
        hint: Which of the pairs: its number, counted from 1 (-1 is the last); "middle"; or "all",
            several hints.
        resize: How an Adapter resizes, where it takes the place of the regressor: "pool" or
            "interpolate".

    Attributes:
        adapters: The regressor or Adapter of each pair that is compared.
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        hint: int | str = "middle",
        resize: str = "pool",
    ) -> None:
        check_pairs("FitNet", pairs)
        check_choice("resize", resize, RESIZES)
        super().__init__(student, teacher, choose_hint(pairs, hint))
        student_shapes = shapes_of(student, [s for s, _ in self.pairs])
        teacher_shapes = shapes_of(teacher, [t for _, t in self.pairs])
        self.adapters = nn.ModuleList(
            Regressor(src, dst) if Regressor.fits(src, dst) else Adapter(src, dst, resize=resize)
            for src, dst in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """See the module."""
        features = zip(self.adapters, *self.features(student, teacher), strict=True)
        losses = [functional.fitnet(adapter(s), t) for adapter, s, t in features]
        return sum(losses[1:], losses[0])


def choose_hint(
    pairs: Sequence[tuple[TapKey, TapKey]], which: int | str
) -> list[tuple[TapKey, TapKey]]:
    """Choose the pairs of taps that are hints.

    Args:
        pairs: All pairs of taps.
        which: Number of a pair, counted from 1 (-1 is the last), "middle" or "all".

    Raises:
        ValueError: If there is no such pair.
    """
    if isinstance(which, str) and which == "all":
        return list(pairs)
    if isinstance(which, str) and which == "middle":
        return [pairs[len(pairs) // 2]] if pairs else []
    number = plain_scalar(which)
    if type(number) is int and 1 <= abs(number) <= len(pairs):
        return [pairs[number - 1 if number > 0 else number]]
    raise ValueError(
        f"hint is {describe_value(which)}; allowed: a pair of stages from 1 to {len(pairs)} (-1 is "
        "the last), 'middle' or 'all'"
    )
