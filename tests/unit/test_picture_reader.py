"""The one reader of picture files: each mode against pixels that are known without it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from espalier.data import pictures
from espalier.data.pictures import PictureError, read

GREY = np.array([[0, 60, 120], [180, 240, 255]], dtype=np.uint8)
ALPHA = np.array([[0, 255, 128], [255, 0, 64]], dtype=np.uint8)
BACKGROUND = (10, 200, 90)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(content: bytes, channels: int = 1, background=(0, 0, 0)) -> np.ndarray:
    return read(content, (channels, *GREY.shape), background)


@pytest.mark.parametrize("turn_bytes", ["<", ">"])
def test_sixteen_bits_are_scaled_and_not_cut_off(turn_bytes):
    deep = (GREY.astype(np.uint16) * 257).astype(f"{turn_bytes}u2")
    mode = "I;16" if turn_bytes == "<" else "I;16B"
    content = saved(Image.frombytes(mode, (3, 2), deep.tobytes()), "TIFF")
    assert np.array_equal(seen(content)[..., 0], GREY)


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
        saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
        b"P5 3 2 65535\n" + (GREY.astype(">u2") * 257).tobytes(),
        b"P2 3 2 255\n" + b" ".join(b"%d" % value for value in GREY.ravel()),
    ],
    ids=["16-bit png", "32-bit tiff", "float tiff", "16-bit pgm", "plain pgm"],
)
def test_deep_grey_is_what_it_is_in_eight_bits(content):
    assert np.array_equal(seen(content)[..., 0], GREY)
    assert np.array_equal(seen(content, channels=3), np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (GREY.astype(np.float32), "mode F with pixels from 0 to 255; allowed are 0 to 1"),
        (np.full((2, 3), np.nan, np.float32), "mode F"),
        (GREY.astype(np.int32) * 100_000, "mode I"),
        (-GREY.astype(np.int32), "mode I"),
    ],
)
def test_numbers_without_a_known_white_are_refused_by_the_name_of_their_mode(pixels, told):
    with pytest.raises(PictureError, match=told):
        seen(saved(Image.fromarray(pixels), "TIFF"))


def test_transparency_shows_the_background_in_each_way_to_store_it():
    colour = np.repeat(GREY[..., None], 3, axis=2)
    share = ALPHA[..., None] / 255
    blended = colour * share + np.array(BACKGROUND) * (1 - share)
    clear, faint = Image.fromarray(np.dstack([colour, ALPHA])), Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
    for image in (clear, faint):
        for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
            found = seen(saved(image, kind, **options), 3, BACKGROUND)
            assert np.abs(found - blended).max() <= 1, (image.mode, kind)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(np.repeat(GREY[..., None], 3, axis=2)),
        Image.fromarray(GREY).convert("P"),
    ],
    ids=["grey", "16 bits", "colour", "palette"],
)
def test_a_value_that_stands_for_transparent_shows_the_background(image):
    key = image.getpixel((2, 0))
    found = seen(saved(image, "PNG", transparency=key), 3, BACKGROUND)
    wanted = np.repeat(GREY[..., None], 3, axis=2)
    wanted[0, 2] = BACKGROUND
    assert np.array_equal(found, wanted)


def test_opaque_pictures_do_not_depend_on_the_background():
    opaque = Image.fromarray(GREY).convert("RGBA")
    content = saved(opaque, "PNG")
    assert np.array_equal(seen(content, 3, (0, 0, 0)), seen(content, 3, (255, 255, 255)))
    assert np.array_equal(seen(content)[..., 0], GREY)


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_other_colour_spaces_become_rgb(mode):
    colour = Image.fromarray(np.repeat(GREY[..., None], 3, axis=2))
    found = seen(saved(colour.convert(mode), "TIFF"), 3)
    assert np.abs(found.astype(int) - GREY[..., None]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("turn", "undone"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, np.rot90),
    ],
)
def test_a_picture_is_turned_as_its_exif_says(kind, turn, undone):
    exif = Image.Exif()
    exif[0x0112] = turn
    wanted = undone(GREY)
    assert np.array_equal(
        read(saved(Image.fromarray(GREY), kind, exif=exif), (1, *wanted.shape), (0, 0, 0))[..., 0], wanted
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    first, second = Image.fromarray(GREY).convert("RGB"), Image.fromarray(255 - GREY).convert("RGB")
    found = seen(saved(first, kind, save_all=True, append_images=[second], **options))
    assert np.array_equal(found[..., 0], GREY)


def test_a_large_picture_is_refused_by_its_head_whatever_its_tiles_claim():
    assert pictures.num_pixels(saved(Image.new("1", (3000, 2000)), "PNG")) == 6_000_000
    with pytest.raises(PictureError, match="larger than 100 pixels"):
        pictures.num_pixels(saved(Image.new("1", (30, 20)), "PNG"), max_pixels=100)
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 322: 20_000, 323: 30_000, 324: 8, 325: 1}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    tiled = struct.pack("<2sHLH", b"II", 42, 8, len(tags)) + entries + bytes(4)  # one pixel in a tile of 600 million
    with pytest.raises(PictureError, match="larger than"):
        pictures.num_pixels(tiled)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"no picture at all", "no picture of PNG"),
        (saved(Image.effect_noise((64, 64), 60), "PNG")[:-400], "truncated"),
        (saved(Image.effect_noise((64, 64), 60), "JPEG")[:-400], "truncated"),
    ],
    ids=["empty", "garbage", "cut png", "cut jpeg"],
)
def test_what_is_no_whole_picture_is_told_in_a_word(content, told):
    with pytest.raises(PictureError, match=told):
        seen(content)
    assert not content or not pictures.is_whole(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_whole_file_is_known_by_its_end(kind, tmp_path):
    content = saved(Image.effect_noise((64, 64), 60), kind)
    (tmp_path / "whole").write_bytes(content)
    assert pictures.is_whole(tmp_path / "whole")
    assert not pictures.is_whole(content[:-80])


@pytest.mark.parametrize("name", ["nocolour", "#12", "#00000000", ""])
def test_a_background_that_is_no_colour_is_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match="no colour; allowed are"):
        pictures.colour(name)
    assert pictures.colour("#102030") == (16, 32, 48)
