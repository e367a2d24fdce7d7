"""Read a picture file as the pixels that a network sees; training, evaluation and the server all use this reader.

numpy and Pillow alone, so that a server without torch reads what training read. docs/data.md has the table of modes.
Letters: C channels, H height, W width.
"""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

SERVED = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # decoders that strangers may reach; Pillow has riskier
FORMATS = (*SERVED, "AVIF", "ICO", "JPEG2000")  # of training; none that runs a program, none that takes any bytes
MAX_PIXELS = 2 * 89_478_485  # beyond twice this number Pillow sees a decompression bomb
WHITE = (255, 255, 255)
CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa", "LAB")  # by Pillow
MAX_16 = 65_535
STEP_16 = 257  # 65,535 / 255
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF 6.0, section 15: a decoder holds a whole tile, however small the picture
TURNS = {  # EXIF 2.3, tag 0x0112: what brings the first row to the top
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

File = str | os.PathLike[str] | bytes  # a path, or the content
Pixels = NDArray[np.uint8]

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of metadata that nothing here reads
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `MAX_PIXELS` decides


class PictureError(ValueError):
    """Says in a few words why a file is not read as a picture."""


def read(
    file: File,
    shape: tuple[int, ...],
    background: Sequence[int],
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Return a picture as (H, W, C) for `shape` = (C, H, W): grey or RGB, its middle scaled bilinearly to H and W.

    Raises:
        PictureError: it is damaged, too large, or of a mode without a stated meaning.
    """
    try:
        with _opened(file, formats, max_pixels) as image:
            return to_array(image, shape, background)
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble on
        raise _explained(file, error, formats, max_pixels) from error


def num_pixels(file: File, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS) -> int:
    """Return the number of pixels that decoding makes, from the head of the file alone; raise as `read` does."""
    try:
        with _opened(file, formats, max_pixels) as image:
            return _size(image)
    except Exception as error:
        raise _explained(file, error, formats, max_pixels) from error


def to_array(image: Image.Image, shape: tuple[int, ...], background: Sequence[int]) -> Pixels:
    """Return an opened Pillow picture as an array, as `read` does; of an animation the first frame.

    Raises:
        PictureError: its mode has no stated meaning.
    """
    channels, height, width = shape
    image.load()  # TIFF turns here by itself, and then says so
    turn = _turn(image)
    image = _on_background(_in_eight_bits(image), background)
    image = image.convert("L" if channels == 1 else "RGB")
    if turn is not None:
        image = image.transpose(turn)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.array(image).reshape(height, width, channels)


def colour(name: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour name or `#rrggbb`.

    Raises:
        ValueError: it is no colour, or a transparent one.
    """
    wrong = ValueError(f"background={name}: no colour; allowed are names such as white, black and grey, or '#808080'")
    try:
        values = ImageColor.getrgb(name)
    except ValueError:
        raise wrong from None
    if len(values) != 3:
        raise wrong
    return values


def is_whole(file: File) -> bool:
    """Return whether a file ends as its format prescribes; after False, only decoding can tell."""
    head, tail, size = _ends(file)
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"\xff\xd8"):
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head.startswith(b"GIF8"):
        return tail.endswith(b"\x3b")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


def _opened(file: File, formats: Sequence[str], max_pixels: int) -> Image.Image:
    image = Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=tuple(formats))
    if _size(image) > max_pixels:
        image.close()
        raise Image.DecompressionBombError
    return image


def _size(image: Image.Image) -> int:
    tags: Any = getattr(image, "tag_v2", {})  # of TIFF
    tile = int(tags.get(TILE_WIDTH) or 0) * int(tags.get(TILE_LENGTH) or 0)
    return max(image.width * image.height, tile)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # EXIF that is damaged says nothing; the pixels beside it are whole
        return None


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale pictures of 16 or 32 bits to 8 bits; transparency is kept.

    Pillow's own conversion would cut all values off at 255.
    """
    if image.mode in CONVERTED:
        return image.convert("RGB") if image.mode == "LAB" else image  # Pillow makes no grey of it
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        _require_within(values, 0, MAX_16, image.mode)
        grey = Image.fromarray(((values + STEP_16 // 2) // STEP_16).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        _require_within(values, 0, 1, image.mode)
        grey = Image.fromarray((values.astype(np.float64) * 255 + 0.5).astype(np.uint8))
    else:
        raise PictureError(f"of mode {image.mode}, which has no stated meaning; convert it to RGB")
    key = image.info.get("transparency")  # of a 16-bit PNG: the one value that is transparent
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _require_within(values: NDArray[Any], least: int, most: int, mode: str) -> None:
    if not (values.min() >= least and values.max() <= most):  # NaN is not, either
        raise PictureError(
            f"of mode {mode} with pixels from {values.min():g} to {values.max():g}; "
            f"allowed are {least} to {most}, which is black to white; scale them"
        )


def _on_background(image: Image.Image, background: Sequence[int]) -> Image.Image:
    if not image.has_transparency_data:
        return image
    key = image.info.get("transparency")  # in the bits of the file, whatever Pillow made of its pixels
    if image.mode == "1" and isinstance(key, int):
        image.info["transparency"] = 255 * key
    elif image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, (*background, 255)), above).convert("RGB")


def _explained(file: File, error: Exception, formats: Sequence[str], max_pixels: int) -> PictureError:
    if isinstance(error, PictureError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return PictureError(f"larger than {max_pixels:,} pixels; make it smaller")
    if isinstance(error, UnidentifiedImageError):
        is_empty = not (len(file) if isinstance(file, bytes) else Path(file).stat().st_size)
        return PictureError("empty" if is_empty else f"no picture of {', '.join(formats)}")
    if isinstance(error, OSError) and error.errno is not None:
        return PictureError(str(error.strerror).lower())
    told = (str(error).splitlines() or [""])[0]
    return PictureError("truncated" if "truncated" in told else f"damaged ({told or type(error).__name__})")


def _ends(file: File) -> tuple[bytes, bytes, int]:
    """Return the first and the last bytes of a file, and its size."""
    if isinstance(file, bytes):
        return file[:16], file[-64:], len(file)
    with Path(file).open("rb") as opened:
        head = opened.read(16)
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 64))
        return head, opened.read(), size
