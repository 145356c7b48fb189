"""Images of every form become the same picture; what cannot be read is refused in words."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from kdtoolkit.data.image_modes import lay_on, turn_upright
from kdtoolkit.data.image_options import check_image_options
from kdtoolkit.data.image_reader import ImageReader, to_channels
from kdtoolkit.data.image_survey import ImageSurvey, check_not_plain
from kdtoolkit.data.images import as_tensor, image_size, to_pil, to_tensor
from kdtoolkit.data.pixel_range import PixelRange


def survey_of(images):
    survey = ImageSurvey()
    for row, image in enumerate(images):
        survey.add(image, "train", f"row {row}")
    return survey


def reader_of(images, background=None, channels=3, pixel_range=None):
    return survey_of(images).decide(check_image_options(background, channels, pixel_range))


def read(image, *, among=None, **options):
    """(C, H, W) of an image of a data set that holds `among`: uint8 levels, as floats."""
    x = as_tensor(reader_of(among or [image], **options).read(image, "row 0")).double()
    found = as_tensor(reader_of(among or [image], **options).read(image, "row 0"))
    return (x * 255 if found.is_floating_point() else x).numpy()


def picture(height=6, width=7, seed=0):
    """(H, W, 3) uint8 with black and white among its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    return pixels


def grey_picture(height=6, width=7, seed=0):
    return np.ascontiguousarray(picture(height, width, seed)[:, :, 0])


def file_of(image, **options):
    """A PIL image that was written to a file and opened again."""
    file = io.BytesIO()
    image.save(file, **options)
    opened = Image.open(io.BytesIO(file.getvalue()))
    opened.load()
    return opened


# --- the same picture, whatever the type, the layout, the mode and the range

# name -> (type, levels 0 .. 255 to values); of 16 bits the lower ones are filled too
RANGES = {
    "uint8": (np.uint8, lambda p: p),
    "uint16, 8 bits": (np.uint16, lambda p: p),
    "uint16, 10 bits": (np.uint16, lambda p: (p << 2) | (p >> 6)),
    "uint16, 12 bits": (np.uint16, lambda p: (p << 4) | (p >> 4)),
    "uint16, 14 bits": (np.uint16, lambda p: (p << 6) | (p >> 2)),
    "uint16, 16 bits": (np.uint16, lambda p: p * 257),
    "int16, 8 bits": (np.int16, lambda p: p),
    "int32, 16 bits": (np.int32, lambda p: p * 257),
    "uint32, 12 bits": (np.uint32, lambda p: (p << 4) | (p >> 4)),
    "int64, 8 bits": (np.int64, lambda p: p),
    "uint64, 16 bits": (np.uint64, lambda p: p * 257),
    "float16 in [0, 1]": (np.float16, lambda p: p / 255),
    "float32 in [0, 1]": (np.float32, lambda p: p / 255),
    "float64 in [0, 1]": (np.float64, lambda p: p / 255),
    "float32 in 0 .. 255": (np.float32, lambda p: p),
    "float64 in 0 .. 255": (np.float64, lambda p: p),
}
TORCH_TYPES = ("uint8", "int16", "int32", "int64", "float16", "float32", "float64")
FORMS = {
    "array (H, W, C)": lambda p: p,
    "array (C, H, W)": lambda p: np.moveaxis(p, -1, 0),
    "tensor (C, H, W)": lambda p: torch.from_numpy(np.ascontiguousarray(np.moveaxis(p, -1, 0))),
    "tensor (H, W, C)": lambda p: torch.from_numpy(np.ascontiguousarray(p)),
}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(RANGES)),
    form=st.sampled_from(sorted(FORMS)),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**16),
)
def test_type_layout_and_range_give_the_same_picture(name, form, height, width, channels, seed):
    dtype, values_of = RANGES[name]
    pixels = picture(height, width, seed)[:, :, :channels]
    image = FORMS[form](values_of(pixels.astype(np.int64)).astype(dtype))
    expected = np.broadcast_to(pixels.transpose(2, 0, 1), (3, height, width))
    tolerance = 0.6 if "float" in name else 0
    assert np.abs(read(image) - expected).max() <= tolerance
    assert survey_of([image]).sizes(reader_of([image])) == {"train": [(height, width)]}


@pytest.mark.parametrize("form", ["array", "tensor"])
def test_images_of_two_sides_are_grey(form):
    pixels = grey_picture()
    image = pixels if form == "array" else torch.from_numpy(pixels)
    assert (read(image) == pixels).all() and read(image).shape == (3, 6, 7)


@pytest.mark.parametrize("form", FORMS)
def test_bool_is_black_and_white(form):
    mask = picture() > 127
    assert (read(FORMS[form](mask)) == mask.transpose(2, 0, 1) * 255.0).all()


MODES = {
    "RGB": (lambda p: Image.fromarray(p), 0),
    "RGBA": (lambda p: Image.fromarray(p).convert("RGBA"), 0),
    "RGBX": (lambda p: Image.fromarray(p).convert("RGBX"), 0),
    "CMYK": (lambda p: Image.fromarray(p).convert("CMYK"), 1),
    "YCbCr": (lambda p: Image.fromarray(p).convert("YCbCr"), 3),
    "HSV": (lambda p: Image.fromarray(p).convert("HSV"), 6),
    "P": (lambda p: Image.fromarray(p).quantize(256, method=Image.Quantize.MEDIANCUT), 0),
}
GREY_MODES = {
    "L": lambda p: Image.fromarray(p),
    "LA": lambda p: Image.fromarray(p).convert("LA"),
    "La": lambda p: Image.fromarray(p).convert("LA").convert("La"),
    "I;16": lambda p: Image.fromarray(p.astype(np.uint16) * 257),
    "I;16 of a PNG": lambda p: file_of(Image.fromarray(p.astype(np.uint16) * 257), format="PNG"),
    "12 bits in a 16-bit PNG": lambda p: file_of(
        Image.fromarray((p.astype(np.uint16) << 4) | (p >> 4)), format="PNG"
    ),
    "I;16B of a TIFF": lambda p: file_of(
        Image.frombytes("I;16B", p.shape[::-1], (p.astype(">u2") * 257).tobytes()), format="TIFF"
    ),
    "I, 8 bits": lambda p: Image.fromarray(p.astype(np.int32)),
    "I of a TIFF, 16 bits": lambda p: file_of(
        Image.fromarray(p.astype(np.int32) * 257), format="TIFF"
    ),
    "F of a TIFF, [0, 1]": lambda p: file_of(
        Image.fromarray(p.astype(np.float32) / 255), format="TIFF"
    ),
    "F, 0 .. 255": lambda p: Image.fromarray(p.astype(np.float32)),
}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(sorted(MODES) + sorted(GREY_MODES)),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    seed=st.integers(0, 2**16),
)
def test_every_mode_gives_the_same_picture(mode, height, width, seed):
    if mode in MODES:
        make, tolerance = MODES[mode]
        pixels = picture(height, width, seed)
        expected = pixels.transpose(2, 0, 1)
    else:
        make, tolerance, pixels = GREY_MODES[mode], 0, grey_picture(height, width, seed)
        expected = np.broadcast_to(pixels, (3, height, width))
    image = make(pixels)
    assert np.abs(read(image) - expected).max() <= tolerance
    found = reader_of([image]).read(image, "row 0")
    assert found.mode == "RGB" and image_size(found) == (height, width)


def test_one_bit_and_lab():
    mask = grey_picture() > 127
    assert (read(Image.fromarray(mask)) == mask * 255.0).all()
    rgb = Image.new("RGB", (6, 5), (200, 90, 40))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab.mode == "LAB"
    assert np.abs(read(lab) - np.asarray(rgb).transpose(2, 0, 1)).max() <= 3


def test_cmyk_jpeg_is_not_inverted():
    colours = Image.new("RGB", (16, 8), (220, 40, 60))
    colours.paste((10, 120, 230), (8, 0, 16, 8))
    jpeg = file_of(colours.convert("CMYK"), format="JPEG", quality=98)  # Adobe's: inverted inside
    assert jpeg.mode == "CMYK" and jpeg.info.get("adobe") is not None
    assert np.abs(read(jpeg) - np.asarray(colours).transpose(2, 0, 1)).max() <= 6
    tiff = file_of(colours.convert("CMYK"), format="TIFF")
    assert np.abs(read(tiff) - np.asarray(colours).transpose(2, 0, 1)).max() <= 1


# --- one range for the whole data set


def test_a_dark_image_is_scaled_as_the_others():
    bright = np.full((6, 7), 4095, np.uint16)
    dark = np.full((6, 7), 160, np.uint16)  # alone it would be an image of 8 bits
    assert (read(dark, among=[dark, bright]) == 10).all()
    assert (read(dark, among=[dark, dark]) == 160).all()
    half = np.full((6, 7), 0.5, np.float32)
    assert abs(read(half, among=[half, half * 0 + 255], pixel_range=(0, 255)) - 0.5).max() <= 0.5
    with pytest.raises(ValueError, match="row 0: the image is in .0, 1., others are in 0 .. 255"):
        reader_of([half, half * 0 + 255])
    assert abs(read(half) - 127.5).max() <= 0.5


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (np.full((5, 5), 4000, np.uint16), np.full((5, 5), 5000, np.uint16), "0 .. 4095"),
        (np.full((5, 5), 250, np.int64), np.full((5, 5), 256, np.int64), "0 .. 255"),
        (np.full((5, 5), 1.0), np.full((5, 5), 200.0), "0 .. 1"),
        (torch.ones(3, 5, 5), torch.full((3, 5, 5), 90.0), "0 .. 1"),
        (torch.ones(3, 5, 5), torch.full((3, 5, 5), -1.0), "remove Normalize"),
        (torch.ones(3, 5, 5), torch.full((3, 5, 5), float("nan")), "nan"),
        (np.full((5, 5), 255.0), np.full((5, 5), np.inf), "inf"),
    ],
)
def test_a_later_image_outside_of_the_range_is_named(first, later, message):
    with pytest.raises(ValueError, match="split 'train', row 9: image values") as error:
        reader_of([first]).read(later, "split 'train', row 9")
    assert message in str(error.value) and "pixel_range=" in str(error.value)


def test_a_later_image_of_another_type_is_named():
    reader = reader_of([picture()])
    with pytest.raises(ValueError, match="row 9: the image is of type uint16.*pass pixel_range="):
        reader.read(np.full((5, 5), 4000, np.uint16), "row 9")


REFUSED = {
    "normalised": (torch.randn(3, 8, 8), "remove Normalize"),
    "normalised array": (np.random.default_rng(0).normal(size=(8, 8, 3)), "remove Normalize"),
    "floats to 16": (np.full((8, 8), 16.0), r"to 16, expected floats in \[0, 1\] or in 0 .. 255"),
    "floats of 16 bits": (np.full((8, 8), 60000.0, np.float32), "to 60000.*pixel_range="),
    "integers to 16": (np.full((8, 8), 16), "1, 8, 10, 12, 14 or 16 bits"),
    "negative integers": (np.full((8, 8), -5, np.int16), "from -5 to -5"),
    "31 bits": (Image.fromarray(np.full((8, 8), 2**30, np.int32)), "pixel_range="),
    "NaN": (np.full((8, 8), np.nan), "NaN"),
    "infinity": (torch.full((3, 8, 8), float("inf")), "infinity"),
    "complex array": (np.zeros((8, 8), np.complex64), "type complex64; allowed are"),
    "complex tensor": (torch.zeros(3, 8, 8, dtype=torch.complex64), "type complex64; allowed are"),
    "objects": (np.full((8, 8), None, object), "type object; allowed are"),
    "text": (np.full((8, 8), "a"), "type <U1; allowed are"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\), expected \(3, H, W\)"),
    "no channels": (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
    "no pixels": (torch.zeros(3, 0, 0), r"shape \(3, 0, 0\)"),
    "one side": (torch.zeros(8), r"shape \(8,\)"),
    "four sides": (np.zeros((1, 3, 8, 8), np.uint8), r"shape \(1, 3, 8, 8\)"),
    "four channels": (np.zeros((8, 8, 4), np.uint8), "background='white'.*or channels=4"),
    "four channels of a tensor": (torch.zeros(4, 8, 8), "background='white'.*or channels=4"),
    "text for an image": ("a.png", "the image is str"),
    "bytes": (b"\x89PNG", "the image is bytes"),
    "nothing": (None, "the image is NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_words(case):
    image, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^row 0: .*{message}"):
        reader_of([image]).read(image, "row 0")


def test_pixel_range_is_the_way_out():
    values = np.array([[-1000, 0, 3000]], np.int16)
    assert (read(values, pixel_range=(-1000, 3000))[0] == [[0, 64, 255]]).all()
    floats = torch.tensor([[[0.0, 8.0, 16.0]]])
    assert np.allclose(read(floats, pixel_range=(0, 16))[0], [[0, 127.5, 255]])
    mixed = reader_of([picture()], pixel_range=(0, 65535))  # no image of 16 bits was looked at
    assert np.asarray(mixed.read(np.full((5, 5), 65535, np.uint16), "row 9")).min() == 255
    with pytest.raises(ValueError, match=r"expected 0 .. 16 \(pixel_range\)"):
        reader_of([floats], pixel_range=(0, 16)).read(floats + 9, "row 1")


@pytest.mark.parametrize(
    ("images", "options", "text"),
    [
        ([picture()], {}, "8 bits"),
        ([np.full((5, 5), 4095, np.uint16)], {}, "integers 0 .. 4095 scaled (decided from"),
        ([torch.ones(3, 5, 5)], {}, "floats in [0, 1]"),
        ([np.full((5, 5), 255.0)], {}, "floats 0 .. 255 scaled"),
        ([np.full((5, 5), 3.0)], {"pixel_range": (0, 4)}, "floats 0 .. 4 scaled (pixel_range)"),
        ([Image.new("RGBA", (5, 5))], {}, "alpha laid on white"),
        ([Image.new("RGBA", (5, 5))], {"background": "black"}, "alpha laid on black"),
        ([Image.new("RGBA", (5, 5))], {"channels": 4}, "4 channels"),
        ([picture()], {"channels": 1}, "grey"),
    ],
)
def test_the_rule_is_said(images, options, text):
    assert text in reader_of(images, **options).description


# --- transparency


def icon():
    """A black square on a transparent ground: the shape is in alpha alone."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6] = 255
    return alpha


def transparent_palette():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 1, 1, 1])
    image.paste(1, (2, 2, 6, 6))
    return file_of(image, format="PNG", transparency=0)


def transparent_colour(mode, ground, shape):
    image = Image.new(mode, (8, 8), ground)
    image.paste(shape, (2, 2, 6, 6))
    return file_of(image, format="PNG", transparency=ground)


def transparent_16_bits():
    values = np.full((8, 8), 0, np.uint16)
    values[2:6, 2:6] = 257
    image = Image.fromarray(values)
    image.info["transparency"] = 0
    return image


ICONS = {
    "RGBA": lambda: Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), icon()])),
    "LA": lambda: Image.fromarray(np.dstack([np.zeros((8, 8), np.uint8), icon()])),
    "PA": lambda: Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), icon()])).convert("PA"),
    "RGBa": lambda: ICONS["RGBA"]().convert("RGBa"),
    "palette": transparent_palette,
    "tRNS of RGB": lambda: transparent_colour("RGB", (0, 0, 0), (1, 1, 1)),
    "tRNS of L": lambda: transparent_colour("L", 0, 1),
    "16 bits": transparent_16_bits,
    "WebP": lambda: file_of(ICONS["RGBA"](), format="WEBP", lossless=True, exact=True),
    "GIF": lambda: file_of(transparent_palette(), format="GIF", transparency=0),
}


@pytest.mark.parametrize("mode", ICONS)
def test_transparent_images_lie_on_the_background(mode):
    options = {"pixel_range": (0, 65535)} if mode == "16 bits" else {}
    ground = 255 - icon().astype(float)
    assert np.abs(read(ICONS[mode](), **options) - ground).max() <= 1
    red = read(ICONS[mode](), background=(255, 0, 0), **options)
    assert np.abs(red - np.stack([ground, ground * 0, ground * 0])).max() <= 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_fourth_channel_is_alpha_if_a_background_is_given(form, dtype):
    pixels = np.dstack([np.zeros((8, 8, 3), np.uint8), icon()])
    values = pixels if dtype == "uint8" else (pixels / 255).astype(np.float32)
    assert np.abs(read(FORMS[form](values), background="white") - (255.0 - icon())).max() <= 1


def test_half_transparent_pixels_are_mixed():
    pixels = np.full((5, 5, 4), 100, np.uint8)
    expected = 100 * 100 / 255 + 255 * 155 / 255
    assert np.abs(read(Image.fromarray(pixels)) - expected).max() <= 1
    assert np.abs(read(torch.from_numpy(pixels), background="white") - expected).max() <= 1
    assert lay_on(Image.fromarray(pixels), (0, 0, 0)).getpixel((0, 0)) == (39, 39, 39)


def test_a_background_that_hides_the_shape_is_refused():
    white = np.dstack([np.full((8, 8, 3), 255, np.uint8), icon()])
    images = [Image.fromarray(white)] * 3
    reader = reader_of(images)
    with pytest.raises(ValueError, match="one plain colour once it is laid on the background"):
        check_not_plain((reader.read(image, "") for image in images), reader)
    black = reader_of(images, background="black")
    check_not_plain((black.read(image, "") for image in images), black)
    plain = reader_of([Image.new("RGBA", (5, 5))])
    check_not_plain([plain.read(Image.new("RGBA", (5, 5)), "")], plain)  # one is no data set


# --- orientation, channels, what transforms return


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, kind):
    """The picture of the camera, turned back from how each orientation stores it."""
    upright = Image.new("L", (16, 8), 20)
    upright.paste(230, (0, 0, 8, 4))
    turns = Image.Transpose
    stored_by = {
        1: [], 2: [turns.FLIP_LEFT_RIGHT], 3: [turns.ROTATE_180], 4: [turns.FLIP_TOP_BOTTOM],
        5: [turns.TRANSPOSE], 6: [turns.ROTATE_90], 7: [turns.TRANSVERSE], 8: [turns.ROTATE_270],
    }  # fmt: skip
    stored = upright
    for turn in stored_by[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "JPEG" else {}
    opened = file_of(stored, format=kind, exif=exif, **quality)
    found = read(opened)
    assert found.shape == (3, 8, 16)
    assert np.abs(found - np.asarray(upright, float)).max() <= 12
    assert survey_of([opened]).sizes(reader_of([opened])) == {"train": [(8, 16)]}
    again = turn_upright(turn_upright(opened))
    assert again.size == (16, 8)


@pytest.mark.parametrize("form", ["pil", *FORMS])
def test_one_channel_is_grey_as_in_pil(form):
    pixels = picture()
    image = Image.fromarray(pixels) if form == "pil" else FORMS[form](pixels)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    found = read(image, channels=1)
    assert found.shape == (1, 6, 7) and (found[0] == grey).all()
    floats = torch.from_numpy(pixels / 255.0).permute(2, 0, 1)[None]
    assert np.abs(to_channels(floats, 1)[0, 0].numpy() * 255 - grey).max() <= 0.51


@pytest.mark.parametrize("form", ["pil", *FORMS])
def test_four_channels_are_kept(form):
    pixels = np.dstack([picture(), grey_picture(seed=1)])
    image = Image.fromarray(pixels) if form == "pil" else FORMS[form](pixels)
    assert (read(image, channels=4) == pixels.transpose(2, 0, 1)).all()
    three = picture() if form == "pil" else FORMS[form](picture())
    if form != "pil":
        with pytest.raises(ValueError, match="expected four channels: leave channels=4 out"):
            read(three, channels=4)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.int64), "type int64, expected uint8 or float in"),
        (torch.full((3, 8, 8), 255.0), r"expected \[0, 1\]. Scale the images."),
        (torch.full((3, 8, 8), -2.0), r"expected \[0, 1\]. Each model normalises"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "type complex64"),
        (np.zeros((8, 8), np.uint16), "type uint16, expected uint8"),
        ([1, 2], "the image is list"),
    ],
)
def test_what_transforms_return_is_checked(made, message):
    with pytest.raises(ValueError, match=f"^the output: .*{message}"):
        to_tensor(made, "the output")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype):
    x = to_tensor(torch.full((3, 5, 5), 0.5, dtype=dtype), "here")
    assert x.dtype == torch.float32 and (x == 0.5).all()


def test_floats_that_resampling_left_outside_do_not_wrap():
    x = torch.full((3, 5, 5), 1.008)
    assert np.asarray(to_pil(to_tensor(x, "here"))).min() == 255
    assert np.asarray(to_pil(to_tensor(x - 1.016, "here"))).max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("chartreuse-ish", 3, None), "background='chartreuse-ish': a colour such as"),
        (((1, 2), 3, None), r"background=\(1, 2\)"),
        (((1, 2, 256), 3, None), "whole numbers from 0 to 255"),
        (((0.5, 0.5, 0.5), 3, None), "whole numbers from 0 to 255"),
        ((3, 3, None), "background=3"),
        ((None, 2, None), "channels=2; allowed: 3, 1"),
        ((None, True, None), "channels=True"),
        ((None, "3", None), "channels='3'"),
        ((None, 3, 255), "pixel_range=255"),
        ((None, 3, (1, 0)), "in rising order"),
        ((None, 3, (0, float("inf"))), "pixel_range="),
        ((None, 3, "01"), "pixel_range='01'"),
        ((None, 3, (0, 1, 2)), "pixel_range="),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_image_options(*options)


def test_colours_by_name():
    assert check_image_options("#ff8000", 3, None).background == (255, 128, 0)
    assert check_image_options([1, 2, 3], 3, (0, 4095)).pixel_range == (0, 4095)
    assert check_image_options(None, 1, None).background is None


def test_uint8_tensors_are_not_copied():
    x = torch.zeros(3, 5, 5, dtype=torch.uint8)
    assert ImageReader().read(x, "").data_ptr() == x.data_ptr()
    assert PixelRange(0, 4095, "integer").to_uint8(np.array([4095, 15, 16])).tolist() == [255, 0, 1]
