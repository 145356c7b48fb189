"""What building networks needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdtoolkit.pipeline.image_memory import check_batch_fits

if TYPE_CHECKING:
    from kdtoolkit.data.dataset import Data
    from kdtoolkit.pipeline.config import DistillConfig


@dataclass(frozen=True)
class DataInfo:
    """Facts of the data; a dry run of a known data set reads no data.

    Attributes:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        data: The loaded splits; None in a dry run of a known data set.
        description: Rows, classes, augmentation and origin, for the plan.
        channels: Channels of the images.
    """

    num_classes: int
    image_size: tuple[int, int]
    data: Data | None
    description: dict[str, Any]
    channels: int = 3

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the class ids, where they are known."""
        return None if self.data is None else self.data.class_names

    @property
    def notes(self) -> list[str]:
        """Sentences about rows and classes, for the plan."""
        return [] if self.data is None else self.data.notes

    @property
    def loaded(self) -> Data:
        """The splits, in a run that has read them."""
        assert self.data is not None
        return self.data


def read_data(config: DistillConfig, dry_run: bool) -> DataInfo:
    """Open the data of a run; of a known data set in a dry run only its description.

    Args:
        config: The configuration; "data" and "loop.seed" are read.
        dry_run: Whether to leave a known data set unread.

    Returns:
        What building networks needs to know of it.
    """
    from kdtoolkit.data.loading import load
    from kdtoolkit.data.options import check_transforms
    from kdtoolkit.data.presets import PRESETS
    from kdtoolkit.data.transform_choice import describe_unread

    options = config.data
    name = options.train_data
    if not dry_run:
        check_batch_fits(config)
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if dry_run and preset is not None:
        side = options.image_size
        image_size = preset.size if side is None else (side, side)
        num_classes = options.num_classes or preset.num_classes
        described = {"name": name, "num_classes": num_classes, "image_size": image_size}
        described["augmentation"], described["evaluation"] = describe_unread(
            check_transforms(options.transforms), preset.augment, image_size, side is not None
        )
        return DataInfo(num_classes, image_size, None, described, options.channels)
    data = load(
        name,
        options.eval_data,
        seed=config.loop.seed,
        validation=options.validation,
        transforms=options.transforms,
        num_classes=options.num_classes,
        num_workers=options.num_workers,
        image_size=options.image_size,
        data_path=options.data_path,
        train_limit=options.train_limit,
        labelled=options.labelled,
        columns=options.columns,
        background=options.background,
        channels=options.channels,
        pixel_range=options.pixel_range,
    )
    return DataInfo(data.num_classes, data.image_size, data, data.describe(), data.channels)
