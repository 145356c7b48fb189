"""Types of the configuration: what Python may pass, and what a shell can write of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal, TypeAlias

    from torch import Tensor, nn

    from kdtoolkit.core.loss import DistillationLoss
    from kdtoolkit.core.method import Method
    from kdtoolkit.data.augment import BatchAugment
    from kdtoolkit.data.transforms import ImageTransform
    from kdtoolkit.pipeline.config import DistillConfig
    from kdtoolkit.types import LossWeight, TapKey

    ConfigSource: TypeAlias = DistillConfig | Mapping[str, Any] | str | os.PathLike[str] | None
    PathLike: TypeAlias = str | os.PathLike[str]
    OptionalPath: TypeAlias = PathLike | None
    NetworkSource: TypeAlias = str | os.PathLike[str] | nn.Module | None
    TeacherSource: TypeAlias = NetworkSource | Sequence[NetworkSource]
    WeightsSource: TypeAlias = PathLike | Mapping[str, Tensor] | None
    TeacherWeightsSource: TypeAlias = WeightsSource | Sequence[WeightsSource]
    DataSource: TypeAlias = Any  # datasets, torch data sets, loaders, names, folders
    MethodSource: TypeAlias = str | Method | Sequence[str | DistillationLoss]
    Layers: TypeAlias = Literal["auto"] | Sequence[tuple[TapKey, TapKey]]
    Weights: TypeAlias = Mapping[str, LossWeight] | None
    Options: TypeAlias = Mapping[str, Any] | None
    TeacherOptions: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
    TeacherHead: TypeAlias = str | Sequence[str | None] | None
    Freeze: TypeAlias = int | str | Sequence[str] | None
    Transforms: TypeAlias = (
        str | BatchAugment | ImageTransform | tuple[ImageTransform, ImageTransform] | None
    )
    Validation: TypeAlias = int | float | str | None
    Background: TypeAlias = str | tuple[int, int, int] | None
    PixelRange: TypeAlias = tuple[float, float] | None
    Workers: TypeAlias = int | str
    Labelled: TypeAlias = int | float | None
    Columns: TypeAlias = tuple[str | None, str | None] | None
    Auto: TypeAlias = bool | str
    Whole: TypeAlias = int
    OptionalWhole: TypeAlias = int | None
    Real: TypeAlias = float
    OptionalReal: TypeAlias = float | None
    Resume: TypeAlias = bool | str | os.PathLike[str]
    Baseline: TypeAlias = Any  # a DistillResult, a folder, True or None
    Trackers: TypeAlias = str | list[str] | None
else:
    from kdtoolkit.pipeline.shell_values import (
        Colour,
        ColumnPair,
        LayerPairs,
        NumberPair,
        Real,
        Scalar,
        Text,
        Texts,
        Values,
        Whole,
    )

    PathLike = OptionalPath = NetworkSource = WeightsSource = DataSource = Transforms = Text
    TeacherSource = TeacherWeightsSource = MethodSource = TeacherHead = Trackers = Texts
    Layers = LayerPairs
    Columns = ColumnPair
    Weights = Options = TeacherOptions = Values
    Freeze = Validation = Workers = Labelled = Auto = Resume = Baseline = Scalar
    Background, PixelRange = Colour, NumberPair
    OptionalWhole, OptionalReal = Whole, Real
