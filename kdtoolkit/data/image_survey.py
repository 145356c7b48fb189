"""A look at the first images of a data set, which decides how all of them are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtoolkit.data.image_modes import WIDE_MODES, is_transparent, turn_upright, wide_values
from kdtoolkit.data.image_reader import ImageOptions, ImageReader, kind_of, layouts_of
from kdtoolkit.data.pixel_range import PixelRange, decide_range, is_unit, mixed_ranges


@dataclasses.dataclass
class ImageSurvey:
    """Facts of the images looked at.

    Attributes:
        values: Smallest and largest value of `"integer"` and of `"float"` images, those that there
            are.
        places: The first place of an image of these kinds, and of `"unit"`, which can only be in
            [0, 1].
        layouts: Of `"array"` and `"tensor"`: the layouts that every one of them may have.
        shapes: Sides of arrays and tensors, (H, W) of PIL images, by split.
        transparent: Whether some PIL image is.
        four_channels: Whether some array or tensor has four channels.
    """

    values: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    layouts: dict[str, set[bool]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    transparent: bool = False
    four_channels: bool = False

    def add(self, image: object, split: str, where: str) -> None:
        """Look at an image.

        Args:
            image: PIL image, array or tensor; anything else is left to the reader to refuse.
            split: Name of the split.
            where: Start of the message of an error.

        Raises:
            ValueError: If its type is neither one of integers nor of floats.
        """
        shapes = self.shapes.setdefault(split, [])
        if isinstance(image, Image.Image):
            image = turn_upright(image)
            self.transparent |= is_transparent(image)
            shapes.append(("pil", (image.height, image.width)))
            if image.mode in WIDE_MODES:
                self._add_values(wide_values(image), where)
        elif isinstance(image, np.ndarray):
            shapes.append(("array", image.shape))
            self._add_layout("array", image.shape)
            self._add_values(image, where)
        elif isinstance(image, Tensor):
            shapes.append(("tensor", tuple(image.shape)))
            self._add_layout("tensor", tuple(image.shape))
            self._add_values(_as_array(image), where)

    def _add_values(self, values: np.ndarray, where: str) -> None:
        if values.dtype in (np.uint8, np.bool_) or not values.size:
            return
        kind = kind_of(values.dtype, where)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{where}: an image holds NaN or infinity: correct that image")
        before = self.values.get(kind, (low, high))
        self.values[kind] = (min(low, before[0]), max(high, before[1]))
        self.places.setdefault(kind, where)
        if is_unit(values):
            self.places.setdefault("unit", where)

    def _add_layout(self, form: str, shape: tuple[int, ...]) -> None:
        found = set(layouts_of(shape))
        if found:
            self.layouts[form] = self.layouts.get(form, {True, False}) & found
        self.four_channels |= len(shape) == 3 and 4 in (shape[0], shape[2])

    def decide(self, options: ImageOptions) -> ImageReader:
        """Decide how images are read.

        Args:
            options: What the user says of them.

        Returns:
            The reader.

        Raises:
            ValueError: If values fit no known range.
        """
        ranges = {
            kind: decide_range(kind, low, high, options.pixel_range, self.places[kind])
            for kind, (low, high) in self.values.items()
        }
        has_unit_images = "unit" in self.places and options.pixel_range is None
        if has_unit_images and ranges["float"].high == 255:
            raise ValueError(mixed_ranges(self.places["unit"], "others are in 0 .. 255"))
        if options.pixel_range is not None:
            kinds = ("integer", "float")
            ranges = {kind: PixelRange(*options.pixel_range, kind, "pixel_range") for kind in kinds}
        return ImageReader(
            options,
            ranges,
            arrays_channels_first=True in self.layouts.get("array", set())
            and False not in self.layouts["array"],
            tensors_channels_first=self.layouts.get("tensor") != {False},
            description=self._describe(options, ranges),
        )

    def _describe(self, options: ImageOptions, ranges: dict[str, PixelRange]) -> str:
        parts = []
        for kind, found in ranges.items():
            if kind in self.values and str(found) != "0 .. 1":
                parts.append(f"{kind}s {found} scaled ({found.reason})")
            elif kind in self.values:
                parts.append(f"{kind}s in [0, 1]")
        if not parts:
            parts.append("8 bits")
        keeps_four = options.channels == 4
        if (self.transparent or self.four_channels) and not keeps_four:
            colour = options.background or (255, 255, 255)
            named = {(255, 255, 255): "white", (0, 0, 0): "black"}.get(colour, str(colour))
            parts.append(f"alpha laid on {named}")
        if options.channels != 3:
            parts.append("grey" if options.channels == 1 else f"{options.channels} channels")
        return ", ".join(parts)

    def sizes(self, reader: ImageReader) -> dict[str, list[tuple[int, int]]]:
        """The sizes that the images have once they are read.

        Args:
            reader: From `decide`.

        Returns:
            Split -> the different (H, W) in pixels.
        """
        return {
            split: list(dict.fromkeys(_size(form, shape, reader) for form, shape in shapes))
            for split, shapes in self.shapes.items()
        }


def _as_array(image: Tensor) -> np.ndarray:
    plain = image.detach().cpu()
    found: np.ndarray = (
        plain.to(torch.float32).numpy() if plain.is_floating_point() else plain.numpy()
    )
    return found


def _size(form: str, shape: tuple[int, ...], reader: ImageReader) -> tuple[int, int]:
    if form == "pil" or len(shape) == 2:
        return shape[0], shape[1]
    default = reader.arrays_channels_first if form == "array" else reader.tensors_channels_first
    layouts = layouts_of(shape)
    first = default if default in layouts or not layouts else layouts[0]
    return (shape[1], shape[2]) if first else (shape[0], shape[1])


def check_not_plain(images: Iterable[Image.Image | Tensor], reader: ImageReader) -> None:
    """Check that transparent images did not all become one plain colour.

    Args:
        images: Some images, as the reader makes them.
        reader: The reader.

    Raises:
        ValueError: If every one of several images is of a single colour.
    """
    count = 0
    for image in images:
        values = np.asarray(image)
        sides = (0, 1) if isinstance(image, Image.Image) else (-2, -1)
        if (values.min(axis=sides) != values.max(axis=sides)).any():
            return
        count += 1
    if count > 1:
        colour = reader.options.background or (255, 255, 255)
        raise ValueError(
            f"each of the {count} images looked at is one plain colour once it is laid on the "
            f"background {colour}: their shape is in the alpha channel; pass another colour, such "
            "as background='black'"
        )
