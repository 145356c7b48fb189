"""Trainable modules between the features of two networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtoolkit.features.layout_conversion import as_map, as_shape, as_tokens, from_map
from kdtoolkit.utils.validation import check_choice

RESIZES = ("pool", "interpolate")


class Adapter(nn.Module):
    """Map one network's feature to the shape of another's, by a 1x1 convolution and resizing.

    It works between any two layouts. Nothing is learned where nothing differs, unless `always`:
    equal channels need no convolution, equal grids no resizing, and between equal shapes it is the
    identity. Class tokens are the source's own where their number is equal; else they come from its
    first class token (from the mean over its positions where it has none) and a learned offset for
    each. The convolution has no bias; it starts as an orthogonal map, so that a feature keeps its
    scale.

    Args:
        src_shape: Shape of the feature that comes in: a `Shape`, or a plain (C, H, W), (L, C) or
            (C,), without the batch.
        dst_shape: Shape of the feature that goes out.
        resize: "pool": a smaller grid by adaptive average pooling, a larger one by bilinear
            interpolation. "interpolate": both by interpolation, antialiased where the grid shrinks.
            A grid that shrinks one way and grows the other is always interpolated.
        always: Whether there is a convolution between equal channels, too. It starts as the
            identity; class tokens get none.

    Raises:
        ValueError: If `resize` is anything else.

    Example:
        ```python
        adapter = Adapter(student.shapes[3], teacher.shapes[3])
        loss = F.mse_loss(adapter(student_out.feats[3]), teacher_out.feats[3])
        ```
    """

    def __init__(
        self,
        src_shape: Sequence[int],
        dst_shape: Sequence[int],
        *,
        resize: str = "pool",
        always: bool = False,
    ) -> None:
        super().__init__()
        check_choice("resize", resize, RESIZES)
        self.src, self.dst, self.resize = as_shape(src_shape), as_shape(dst_shape), resize
        self.proj: nn.Module = nn.Identity()
        self.token_proj: nn.Module | None = None
        self.token_offset: nn.Parameter | None = None
        if always or self.src.channels != self.dst.channels:
            conv = nn.Conv2d(self.src.channels, self.dst.channels, 1, bias=False)
            equal = self.src.channels == self.dst.channels
            (nn.init.dirac_ if equal else nn.init.orthogonal_)(conv.weight)
            self.proj = conv
        if self.dst.prefix and self.src.channels != self.dst.channels:
            self.token_proj = nn.Linear(self.src.channels, self.dst.channels)
        if self.dst.prefix and self.src.prefix != self.dst.prefix:
            self.token_offset = nn.Parameter(torch.zeros(self.dst.prefix, self.dst.channels))

    @property
    def is_identity(self) -> bool:
        """Whether the two shapes are equal, and nothing is learned between them."""
        return self.src.like(self.dst) and isinstance(self.proj, nn.Identity)

    def forward(self, feature: Tensor) -> Tensor:
        """Map a feature in the source's layout, with the batch, to the destination's."""
        if self.is_identity:
            return feature
        x = as_map(feature, self.src)
        rows, columns = self.dst.grid
        if x.shape[2] * x.shape[3] >= rows * columns:  # the convolution runs on the smaller side
            x = self.proj(self._resize(x))
        else:
            x = self._resize(self.proj(x))
        return from_map(x, self.dst, self._make_tokens(feature) if self.dst.prefix else None)

    def _resize(self, x: Tensor) -> Tensor:
        grid = self.dst.grid
        if tuple(x.shape[2:]) == grid:
            return x
        shrinks = [new <= old for new, old in zip(grid, x.shape[2:], strict=True)]
        if all(shrinks) and self.resize == "pool":
            return F.adaptive_avg_pool2d(x, grid)
        return F.interpolate(x, grid, mode="bilinear", align_corners=False, antialias=any(shrinks))

    def _make_tokens(self, feature: Tensor) -> Tensor:
        """Class tokens (B, prefix, C) of the destination."""
        if self.src.prefix:
            tokens = as_tokens(feature, self.src)[:, : self.src.prefix]
        else:
            tokens = as_map(feature, self.src).mean((2, 3))[:, None]
        if self.token_offset is not None:
            tokens = tokens[:, :1].expand(-1, self.dst.prefix, -1)
        tokens = tokens if self.token_proj is None else self.token_proj(tokens)
        return tokens if self.token_offset is None else tokens + self.token_offset

    def extra_repr(self) -> str:
        """The two shapes, for `print`."""
        return f"{tuple(self.src)} {self.src.layout} -> {tuple(self.dst)} {self.dst.layout}"
