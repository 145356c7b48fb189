"""From an image as a data set gives it to an RGB image of 8 bits, or a tensor in [0, 1].

One `ImageReader` reads all images of a data set: the same rules for PIL images, arrays and tensors,
for rows and for the batches of a DataLoader.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdtoolkit.data.image_modes import (
    EXIF_KEYS,
    OUTPUT_MODES,
    WIDE_MODES,
    convert,
    turn_upright,
    wide_as_8_bits,
    wide_values,
)
from kdtoolkit.data.pixel_range import UNIT, PixelRange

WHITE = (255, 255, 255)
HEADER_KEYS = {"transparency", *EXIF_KEYS}  # of a PIL image that is to be changed
CHANNELS = (1, 3, 4)  # that an image may have
LUMA = (19595, 38470, 7471)  # of R, G and B in grey, in units of 2**-16, as in PIL


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What the user says of the images.

    Attributes:
        background: Colour (R, G, B) that transparent images are laid on; None: white, and arrays
            and tensors of four channels are refused, for their fourth may be anything.
        channels: Number of channels of the images that networks get: 1, 3 or 4.
        pixel_range: Values of black and white of images that are not of 8 bits; None: decide.
    """

    background: tuple[int, int, int] | None = None
    channels: int = 3
    pixel_range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads the images of a data set.

    Attributes:
        options: What the user says of them.
        ranges: Values of black and white, of `"integer"` and of `"float"` images; of 8 bits and
            bool they are known.
        arrays_channels_first: Whether an array whose first and last side may both be channels is
            (C, H, W).
        tensors_channels_first: The same for tensors.
        description: What is done, in words; "" for a reader of the output of transforms.
    """

    options: ImageOptions = ImageOptions()
    ranges: Mapping[str, PixelRange] = dataclasses.field(default_factory=lambda: {"float": UNIT})
    arrays_channels_first: bool = False
    tensors_channels_first: bool = True
    description: str = ""

    def read(self, image: object, where: str) -> Image.Image | Tensor:
        """Read an image.

        Args:
            image: PIL image of any mode, array or tensor, (H, W), (H, W, C) or (C, H, W).
            where: Start of the message of an error.

        Returns:
            A tensor (C, H, W), uint8 or float32 in [0, 1], of a tensor; else a PIL image of mode
            RGB (L for one channel, RGBA for four).

        Raises:
            ValueError: If the kind, the shape, the type or the range of values is not allowed.
        """
        if self.is_ready(image):
            return image  # type: ignore[return-value]
        if isinstance(image, Image.Image):
            return self._read_pil(image, where)
        if isinstance(image, np.ndarray):
            return self._read_array(image, where)
        if isinstance(image, Tensor):
            if image.ndim not in (2, 3):
                raise ValueError(f"{where}: {_shape_message(image.shape)}")
            return self.read_batch(image[None], where)[0]
        raise ValueError(
            f"{where}: the image is {type(image).__name__}, expected a (3, H, W) tensor, an array "
            "or a PIL image"
        )

    def is_ready(self, image: object) -> bool:
        """Whether an image is as `read` makes it, seen at a glance; most are.

        Args:
            image: An image of any kind.

        Returns:
            True for a uint8 tensor (C, H, W) and for an upright, opaque RGB image of PIL.
        """
        if type(image) is Tensor:
            if image.dtype != torch.uint8 or image.ndim != 3:
                return False
            channels, height, width = image.shape
            sure = self.tensors_channels_first or width not in CHANNELS
            return channels == self.options.channels and sure and height > 0 and width > 0
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            return False
        return self.options.channels == 3 and HEADER_KEYS.isdisjoint(image.info)

    def read_batch(self, x: Tensor, where: str) -> Tensor:
        """Read a batch of tensors.

        Args:
            x: (B, C, H, W), (B, H, W, C) or (B, H, W) of any real type.
            where: Start of the message of an error.

        Returns:
            (B, C, H, W), uint8 or float32 in [0, 1].

        Raises:
            ValueError: As `read`.
        """
        plain: Tensor = x.as_subclass(Tensor)  # type: ignore[arg-type]
        if plain.ndim == 3:
            plain = plain[:, None]
        elif not is_channels_first(plain.shape[1:], self.tensors_channels_first, where):
            plain = plain.permute(0, 3, 1, 2)
        return self._match_channels(self._scale_tensor(plain, where), where)

    def _read_pil(self, image: Image.Image, where: str) -> Image.Image:
        mode, background = OUTPUT_MODES[self.options.channels], self.options.background or WHITE
        image = turn_upright(image)
        if image.mode in WIDE_MODES:
            values = self._eight_bits(wide_values(image), where)
            image = wide_as_8_bits(image, values, background)
        return convert(image, mode, background)

    def _read_array(self, array: np.ndarray, where: str) -> Image.Image:
        if array.ndim == 3 and is_channels_first(array.shape, self.arrays_channels_first, where):
            array = array.transpose(1, 2, 0)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ValueError(f"{where}: {_shape_message(array.shape)}")
        channels = 1 if array.ndim == 2 else array.shape[2]
        self._check_fourth_channel(channels, array.shape, where)
        image = Image.fromarray(np.ascontiguousarray(self._eight_bits(array, where)))
        return convert(image, OUTPUT_MODES[self.options.channels], self.options.background or WHITE)

    def _eight_bits(self, values: np.ndarray, where: str) -> np.ndarray:
        if values.dtype == np.uint8:
            return values
        if values.dtype == np.bool_:
            return values * np.uint8(255)
        found = self._range_of(values.dtype, where)
        found.check_values(values, where)
        return found.to_uint8(values)

    def _scale_tensor(self, x: Tensor, where: str) -> Tensor:
        if x.dtype == torch.uint8:
            return x
        if x.dtype == torch.bool:
            return x.to(torch.uint8) * 255
        if not x.is_floating_point():
            return torch.from_numpy(self._eight_bits(x.detach().cpu().numpy(), where))
        found = self._range_of(np.dtype(np.float32), where)
        values = x.detach().to(torch.float32)
        if found.high == 1:
            low, high = values.aminmax()
            found.check(float(low), float(high), where)
        else:
            for image in values:
                found.check_values(image.cpu().numpy(), where)
        return found.to_unit(values)

    def _range_of(self, dtype: np.dtype, where: str) -> PixelRange:
        kind = kind_of(dtype, where)
        if kind in self.ranges:
            return self.ranges[kind]
        if not self.description:
            raise ValueError(f"{where}: images of type {dtype}, expected uint8 or float in [0, 1]")
        raise ValueError(
            f"{where}: the image is of type {dtype}, and no image that was looked at first is: "
            "pass pixel_range=(value of black, value of white) of such images"
        )

    def _check_fourth_channel(self, channels: int, shape: Sequence[int], where: str) -> None:
        if channels == 4 and self.options.channels != 4 and self.options.background is None:
            raise ValueError(
                f"{where}: the image has shape {tuple(shape)}, four channels: pass "
                "background='white' (or another colour) if the fourth is alpha, or channels=4 for "
                "networks that take all four"
            )
        if self.options.channels == 4 and channels != 4:
            raise ValueError(
                f"{where}: the image has shape {tuple(shape)}, expected four channels: leave "
                "channels=4 out"
            )

    def _match_channels(self, x: Tensor, where: str) -> Tensor:
        """(B, C, H, W) with the number of channels that networks get."""
        channels, wanted = x.shape[1], self.options.channels
        if channels == wanted:
            return x
        self._check_fourth_channel(channels, x.shape[1:], where)
        if channels == 4:
            x = _lay_tensor_on(x, self.options.background or WHITE)
        return x.expand(-1, wanted, -1, -1) if channels == 1 else to_channels(x, wanted)


def to_channels(x: Tensor, channels: int) -> Tensor:
    """Make grey images of colour ones.

    Args:
        x: (B, 3, H, W), uint8 or float.
        channels: 1 or 3.

    Returns:
        (B, channels, H, W).
    """
    if channels == x.shape[1]:
        return x
    if x.dtype == torch.uint8:
        weights = torch.tensor(LUMA, dtype=torch.int32, device=x.device).view(1, 3, 1, 1)
        return (((x.int() * weights).sum(1, keepdim=True) + 2**15) >> 16).to(torch.uint8)
    weights = torch.tensor(LUMA, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    return (x * (weights / 2**16)).sum(1, keepdim=True)


def _lay_tensor_on(x: Tensor, background: tuple[int, int, int]) -> Tensor:
    """(B, 3, H, W) of (B, 4, H, W), uint8 or float in [0, 1]."""
    scale = 255 if x.dtype == torch.uint8 else 1
    values = x.float() / scale
    colour = torch.tensor(background, device=x.device).view(1, 3, 1, 1) / 255
    laid = colour + (values[:, :3] - colour) * values[:, 3:]
    return (laid * 255).round().to(torch.uint8) if scale == 255 else laid


def is_channels_first(shape: Sequence[int], default: bool, where: str) -> bool:
    """Whether an image is (C, H, W) and not (H, W, C).

    Args:
        shape: Three sides.
        default: The answer where both its first and its last side may be channels.
        where: Start of the message of an error.

    Returns:
        Whether the first side are the channels.

    Raises:
        ValueError: If neither of them may be.
    """
    answers = layouts_of(shape)
    if not answers:
        raise ValueError(f"{where}: {_shape_message(shape)}")
    return default if default in answers else answers[0]


def layouts_of(shape: Sequence[int]) -> list[bool]:
    """The layouts that a shape of three sides may be: True for (C, H, W), False for (H, W, C).

    Args:
        shape: The sides.

    Returns:
        None, one or both of them.
    """
    if len(shape) != 3 or 0 in shape:
        return []
    return [first for first, side in ((True, shape[0]), (False, shape[2])) if side in CHANNELS]


def kind_of(dtype: np.dtype, where: str) -> str:
    """Whether a type is one of integers or of floats.

    Args:
        dtype: The type, none of uint8 and bool.
        where: Start of the message of an error.

    Returns:
        `"integer"` or `"float"`.

    Raises:
        ValueError: If it is neither.
    """
    if np.issubdtype(dtype, np.integer):
        return "integer"
    if np.issubdtype(dtype, np.floating):
        return "float"
    raise ValueError(f"{where}: images of type {dtype}; allowed are integers, floats and bool")


def _shape_message(shape: Sequence[int]) -> str:
    return (
        f"the image has shape {tuple(shape)}, expected (3, H, W) or (H, W, 3), with 1, 3 or 4 "
        "channels"
    )
