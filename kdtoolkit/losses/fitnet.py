"""FitNet hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, arXiv 1412.6550).

Loss     mean over all elements of (R(f_s) - f_t)^2 at the hint stage
         R: convolution whose kernel and stride take the student's grid to the teacher's, BatchNorm, ReLU
Differs  one stage of training together with cross-entropy (the paper: two stages), as in Tian et al. 2020; where no
         kernel of theirs fits (other size ratios, tokens) an Adapter takes the place of R
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.registries import register_loss
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, Shape, TapKey


class Regressor(nn.Module):
    """Student map (B, C_s, H_s, W_s) -> teacher's shape: convolution (with bias), BatchNorm, ReLU.

    H_s = H_t 1x1; H_s = 2 H_t 3x3 with stride 2; 2 H_s = H_t transposed 4x4 with stride 2; H_s > H_t else a kernel of
    1 + H_s - H_t without padding. `fits(src, dst)` says whether one of these applies.
    """

    def __init__(self, src: Shape, dst: Shape):
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
        (h_s, w_s), (h_t, w_t) = src.grid, dst.grid
        maps = src.layout == dst.layout == "NCHW"
        return maps and (
            (2 * h_s, 2 * w_s) == (h_t, w_t) or (h_s >= h_t and w_s >= w_t and 1 + h_s - h_t <= 16)
        )

    def forward(self, feature: Tensor) -> Tensor:
        return self.bn(self.conv(feature)).relu()


@register_loss(
    "fitnet",
    losses={"ce": 1.0, "fitnet": 100.0},
    title="Hints from a middle stage (Romero et al. 2015)",
)
class FitNet(DistillationLoss):
    """Hints from a middle stage.

    hint    which pair of stages, counted from 1 (-1 the last); "middle"; or "all" for every pair (several hints)
    resize  of an Adapter: "pool" or "interpolate"
    """

    def __init__(
        self,
        student: Taps,
        teacher: Frozen,
        pairs: Sequence[tuple[TapKey, TapKey]] = (),
        *,
        hint: int | str = "middle",
        resize: str = "pool",
    ):
        super().__init__(student, teacher, choose_hint(pairs, hint))
        shapes = [(student.end(s).shape, teacher.end(t).shape) for s, t in self.pairs]
        self.adapters = nn.ModuleList(
            Regressor(s, t) if Regressor.fits(s, t) else Adapter(s, t, resize=resize)
            for s, t in shapes
        )

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        features = zip(self.adapters, *self.features(student, teacher), strict=True)
        losses = [functional.fitnet(adapter(s), t) for adapter, s, t in features]
        return sum(losses[1:], losses[0])


def choose_hint(
    pairs: Sequence[tuple[TapKey, TapKey]], which: int | str
) -> list[tuple[TapKey, TapKey]]:
    """One pair by number, the middle one, or all."""
    if which == "all":
        return list(pairs)
    if which == "middle":
        return [pairs[len(pairs) // 2]] if pairs else []
    if isinstance(which, int) and 1 <= abs(which) <= len(pairs):
        return [pairs[which - 1 if which > 0 else which]]
    raise ValueError(
        f"hint {which!r}: give a pair of stages from 1 to {len(pairs)} (-1 the last), 'middle' or 'all'"
    )
