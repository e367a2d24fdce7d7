"""Turn the body of a request into raw samples, or into one sentence that says what is wrong with it.

Nothing of a request is executed, opened as a path or fetched: numbers come as JSON, pictures as their bytes.
Letters: B batch.
"""

import base64
import binascii
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, chain
from operator import mul
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header

from espalier.data.pictures import SERVED as PICTURES
from espalier.data.pictures import PictureError, num_pixels, read
from espalier.export.preprocess import scaled
from espalier.serving.errors import RequestError
from espalier.spec import DataSpec

PICTURE_TYPES = frozenset(  # what a client may call a picture; its first bytes say what it is
    f"image/{name}"
    for name in (
        *("png", "jpeg", "bmp", "gif", "webp", "tiff"),
        *("x-portable-anymap", "x-portable-bitmap", "x-portable-graymap", "x-portable-pixmap"),
    )
)
MAX_PIXELS = 16_000_000  # of all pictures of a request: a file of a few kB can claim any number
LARGE_PIXELS = 1_000_000  # of a picture; of larger ones, which cost 20 bytes a pixel, one is decoded at a time
ONE_LARGE = threading.Lock()
MAX_MESSAGE = 200  # letters of somebody else's error in ours
LARGEST = float(np.finfo(np.float32).max)
NUMBERS = {int, float}  # not bool, which is a kind of int to Python
DEEP = 9  # lists in each other, more than any shape has
RAGGED = "rows of different lengths, or nested too deep"

Raw = NDArray[Any]  # float32, or int64 of token ids


def from_json(body: bytes) -> list[Any]:
    """Return the items of `{"inputs": [...]}`.

    Raises:
        RequestError: the body is not of this form.
    """
    try:
        content = orjson.loads(body)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:MAX_MESSAGE]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise RequestError(422, 'the body must be an object with a list: {"inputs": [sample, ...]}')
    if len(content) > 1:
        raise RequestError(422, 'the body has other keys beside "inputs"; nothing else is allowed')
    return content["inputs"]


def require_count(num_samples: int, most: int) -> None:
    """Raise `RequestError` unless there is at least one sample, and no more than the queue can hold."""
    if not num_samples:
        raise RequestError(422, "there is no sample in the request; send at least one")
    if num_samples > most:
        raise RequestError(413, f"{num_samples} samples in one request, at most {most} are allowed; split them")


def has_pictures(items: Sequence[Any]) -> bool:
    """Return whether an item is an object, that is, a picture and no array."""
    return any(isinstance(item, dict) for item in items)


def require_parts(spec: DataSpec, body: bytes, most: int) -> None:
    """Raise `RequestError` if a JSON body has more lists and numbers than `most` samples have.

    They are counted in the bytes, before parsing: eight million bytes of `[],` would become 200 million of objects.
    """
    num_lists = sum(accumulate(spec.shape[:-1], mul, initial=1))
    largest = 2 + most * (math.prod(spec.shape) + num_lists + 2)
    if sum(map(body.count, (b",", b"[", b"{"))) > largest:
        raise RequestError(413, f"the body has more parts than {most} samples of shape {list(spec.shape)}; split it")


def arrays(spec: DataSpec, items: Sequence[Any]) -> Raw:
    """Return raw samples (B, *shape) of nested lists of numbers.

    Lengths and types are checked level by level before numpy sees the numbers: of `[["aaa...", ""]]` it would make
    an array in which every entry is as long as the longest.

    Raises:
        RequestError: a list is ragged, of another shape, or holds something other than finite numbers.
    """
    level: Sequence[Any] = items
    for size in spec.shape:
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise _misfit(spec, items)
        level = list(chain.from_iterable(level))
    if not set(map(type, level)) <= NUMBERS:
        raise _misfit(spec, items)
    with np.errstate(over="ignore"):
        given = np.array(level, dtype=np.float32)
    if not np.isfinite(given).all():
        raise RequestError(422, f"a number is beyond {LARGEST:.3g}, the largest of 32 bits")
    return given.reshape(len(items), *spec.shape)


def mixed(spec: DataSpec, items: Sequence[Any]) -> Raw:
    """Return raw samples (B, *shape) of items that are arrays or `{"image": "base64 of a picture file"}`."""
    files = [_base64(item, f"inputs[{place}]") for place, item in enumerate(items) if isinstance(item, dict)]
    decoded = iter(pictures(spec, files))
    return np.concatenate([next(decoded)[None] if isinstance(item, dict) else arrays(spec, [item]) for item in items])


def form(content_type: bytes, body: bytes, most: int) -> list[bytes]:
    """Return the files of a `multipart/form-data` body.

    Raises:
        RequestError: it is damaged, has other fields, or too many files.
    """
    files: list[bytes] = []

    def keep(file: Any) -> None:
        require_count(len(files) + 1, most)
        file.file_object.seek(0)
        files.append(file.file_object.read())

    def refuse(field: Any) -> None:
        raise RequestError(422, "the form has a field that is no file; send picture files alone")

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(400, "the content type multipart/form-data names no boundary")
    try:
        limits = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # so that no file goes to the disk
        parser = FormParser("multipart/form-data", refuse, keep, boundary=boundary, config=limits)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(400, f"the form is damaged: {str(error)[:MAX_MESSAGE]}") from None
    require_count(len(files), most)
    return files


def pictures(spec: DataSpec, files: Sequence[bytes]) -> Raw:
    """Return raw samples (B, *shape) of picture files.

    Raises:
        RequestError: one cannot be read, all together are too large, or the network does not take pictures.
    """
    if spec.input.is_tokens:
        raise RequestError(422, 'this network takes texts, not pictures: {"inputs": ["a text", ...]}')
    if not spec.is_image or spec.shape[0] not in (1, 3):
        raise RequestError(422, f"this network takes numbers of shape {list(spec.shape)}, not pictures")
    total = 0
    raw = []
    for place, data in enumerate(files):
        try:
            num = num_pixels(data, PICTURES, MAX_PIXELS)
            total += num
            _require_pixels(total)
            with ONE_LARGE if num > LARGE_PIXELS else nullcontext():
                raw.append(scaled(spec, read(data, spec.shape, spec.background, PICTURES, MAX_PIXELS)))
        except PictureError as error:
            if isinstance(error.__cause__, Image.DecompressionBombError):
                _require_pixels(MAX_PIXELS + 1)
            allowed = ", ".join(PICTURES)
            raise RequestError(
                422, f"picture {place} cannot be read: {str(error)[:MAX_MESSAGE]}; whole files of {allowed} are allowed"
            ) from None
    return np.stack(raw)


def _require_pixels(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise RequestError(413, f"the pictures have more than {MAX_PIXELS} pixels in all; send smaller or fewer ones")


def _base64(item: dict[str, Any], where: str) -> bytes:
    text = item.get("image")
    if len(item) != 1 or not isinstance(text, str):
        raise RequestError(422, f'{where}: an object must be {{"image": "base64 of a picture file"}}')
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(422, f"{where}.image: not base64") from None


def _misfit(spec: DataSpec, items: Sequence[Any]) -> RequestError:
    """Say which sample is wrong, and how."""
    allowed = f"each sample must be numbers of shape {list(spec.shape)}"
    for place, item in enumerate(items):
        if wrong := _wrong(spec.shape, item):
            return RequestError(422, f"inputs[{place}]: {wrong}; {allowed}")
    return RequestError(422, allowed)


def _wrong(shape: Sequence[int], item: Any) -> str | None:
    """Return what is wrong with a sample, reading no more of it than the shape has."""
    level = [item]
    for size in (*shape, None):  # None: of a number
        kinds = set(map(type, level))
        if not kinds <= {list, *NUMBERS}:
            return "something that is no number"
        lengths = {len(each) if type(each) is list else None for each in level}
        if len(lengths) > 1:
            return RAGGED
        if lengths != {size}:
            return _shape(item)
        level = list(chain.from_iterable(level)) if size is not None else []
    return None


def _shape(item: Any) -> str:
    """Return the lengths of the first list, of the first list in it, and so on."""
    lengths: list[int] = []
    while isinstance(item, list):
        lengths.append(len(item))
        if len(lengths) == DEEP:
            return RAGGED
        item = item[0] if item else None
    return f"shape {lengths}"
