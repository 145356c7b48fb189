"""The user's evaluation transform in the terms of timm's data configuration, where it has some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import nn

from kdtoolkit.data.transforms import EvalTransform, ImageTransform, crop_share

CONVERSIONS = (  # names of steps that change the type of an image and not its pixels
    "ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ToDtype", "ConvertImageDtype",
    "MaybeToTensor", "MaybePILToTensor",
)  # fmt: skip
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MAX_TEXT = 300  # characters of a transform's description


def in_timm_terms(transform: object, size: tuple[int, int], image: object) -> EvalTransform:
    """Describe a transform as timm's `create_transform` can make it again.

    Known are torchvision's `Resize` and `CenterCrop`, in this order, before the image becomes a
    tensor; and no change of the pixels at all.

    Args:
        transform: The user's transform.
        size: (H, W) of its output in pixels.
        image: An image that it gets.

    Returns:
        The terms; with `is_exact=False` those of images that have the size already, where the
        transform has none.
    """
    unknown = EvalTransform(size, is_exact=False)
    if not isinstance(image, Image.Image):
        return unknown
    steps = list(_flat_steps(transform))
    pixels = [step for step in steps if type(step).__name__ not in CONVERSIONS]
    if any(a is not b for a, b in zip(pixels, steps, strict=False)):
        return unknown  # resized as a tensor, which rounds differently
    names = [type(step).__name__ for step in pixels]
    if not all(type(step).__module__.startswith("torchvision.") for step in pixels):
        return unknown
    if not names:
        return EvalTransform(size)
    if names == ["Resize"]:
        return _of_resize(pixels[0], size) or unknown
    if names == ["Resize", "CenterCrop"]:
        return _of_crop(pixels[0], size) or unknown
    return unknown


def describe_transform(transform: object) -> str:
    """Describe a user's transform in a line.

    Args:
        transform: Any callable.

    Returns:
        Its name or representation, of at most 300 characters.
    """
    text = getattr(transform, "__qualname__", None) or " ".join(repr(transform).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def own_transform(dataset: Any) -> ImageTransform | None:
    """The transform that a data set has of its own, also inside `Subset`s.

    Args:
        dataset: Any data set.

    Returns:
        The attribute `transform` of torchvision's, what `set_transform` of an HF data set got, or
        None.
    """
    while not callable(getattr(dataset, "transform", None)) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    found = getattr(dataset, "transform", None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    of_format = getattr(dataset, "format", None)
    options = of_format.get("format_kwargs") if isinstance(of_format, dict) else None
    return (options or {}).get("transform")


def _flat_steps(transform: Any) -> Iterator[Any]:
    steps = getattr(transform, "transforms", None)
    if isinstance(transform, nn.Sequential):
        steps = list(transform)
    if isinstance(steps, (list, tuple)):
        for step in steps:
            yield from _flat_steps(step)
    else:
        yield transform


def _of_resize(resize: Any, size: tuple[int, int]) -> EvalTransform | None:
    """A resize of both sides."""
    sides = resize.size
    interpolation = _interpolation(resize)
    if not isinstance(sides, (list, tuple)) or tuple(sides) != size or interpolation is None:
        return None
    return EvalTransform(size, crop_mode="squash", interpolation=interpolation)


def _of_crop(resize: Any, size: tuple[int, int]) -> EvalTransform | None:
    """A resize of the shorter side before the crop of a square."""
    sides = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    is_plain = len(sides) == 1 and getattr(resize, "max_size", None) is None
    interpolation = _interpolation(resize)
    if not is_plain or size[0] != size[1] or sides[0] < size[0] or interpolation is None:
        return None
    return EvalTransform(size, crop_share(size[0], sides[0]), interpolation=interpolation)


def _interpolation(resize: Any) -> str | None:
    """Name of the interpolation in timm, None where it has none."""
    mode = resize.interpolation
    if isinstance(mode, int):
        mode = Image.Resampling(mode).name.lower()
    name = str(getattr(mode, "value", mode))
    return name if name in INTERPOLATIONS else None
