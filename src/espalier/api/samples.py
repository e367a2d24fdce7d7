"""Turn what a user hands to `predict` into raw samples: arrays, pictures, paths, texts. Needs numpy and Pillow alone.

Letters: N samples.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from espalier.data import pictures, tokens
from espalier.errors import CONTROL, ConfigError
from espalier.export import preprocess
from espalier.spec import DataSpec

Item = Image.Image | str | os.PathLike[str]
Given = ArrayLike | Item | Sequence[Item]
Raw = NDArray[Any]  # float32, or int64 of token ids
ITEMS = (Image.Image, str, os.PathLike)
NUMBERS = "iuf"  # kinds of numpy: no truth values, no texts, no objects


def raw_samples(spec: DataSpec, given: Given) -> Raw:
    """Return raw samples (N, *shape) of an array, of pictures, of paths or of texts; a single one gives N = 1.

    Raises:
        ConfigError: there is no sample, or one is of another type or shape, or not finite.
    """
    if len(spec.inputs) > 1:
        names = ", ".join(each.name for each in spec.inputs)
        raise ConfigError(f"predict: a sample of this network is several inputs, {names}; only one can be given here")
    if spec.input.is_tokens:
        return _of_texts(spec, given)
    if isinstance(given, ITEMS):
        return _of_item(spec, given)
    if isinstance(given, Sequence) and any(isinstance(each, ITEMS) for each in given):
        odd = next((each for each in given if not isinstance(each, ITEMS)), None)
        if odd is not None:
            raise ConfigError(f"predict: a list of pictures or paths that holds a {type(odd).__name__} as well")
        return np.concatenate([_of_item(spec, each) for each in given])  # type: ignore[arg-type]
    return _of_array(spec, given)


def _of_texts(spec: DataSpec, given: Any) -> NDArray[np.int64]:
    """Return the token ids (N, T) of a text, or of a list, an array or a column of texts."""
    if hasattr(given, "tolist"):  # of numpy and pandas
        given = given.tolist()
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple):
        raise ConfigError(f"predict: takes a text or a list of texts; a {type(given).__name__} is not that")
    if not texts:
        raise ConfigError("predict: there is no sample; give at least one")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"predict: this network takes texts; sample {place} is a {type(text).__name__}")
    encode = tokens.Encoder(spec.input, spec.longest[0][1])
    return tokens.padded([encode(text) for text in texts])


def _of_item(spec: DataSpec, item: Item) -> Raw:
    """Return the samples of one picture, of its file, or of a CSV file: (N, *shape)."""
    if isinstance(item, Image.Image) or spec.is_image:
        _require_pictures(spec)
        try:
            if isinstance(item, Image.Image):
                return preprocess.raw_of(spec, item)[None]
            return preprocess.scaled(spec, pictures.read(_existing(item), spec.shape, spec.background))[None]
        except pictures.PictureError as error:
            raise ConfigError(f"predict: {_name(item)}: {error}") from error
    path = _existing(item)
    if path.suffix.lower() != ".csv":
        raise ConfigError(f"predict: {path}: this network takes {_shapes(spec)}; give an array, or a file NAME.csv")
    return _checked(spec, _of_csv(path), str(path))


def _of_array(spec: DataSpec, given: Any) -> Raw:
    if hasattr(given, "detach"):  # a tensor of torch, on any device, of any kind of number
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    try:
        array = np.asarray(given)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in NUMBERS:
        kind = f"an array of {array.dtype}" if isinstance(given, np.ndarray) else f"a {type(given).__name__}"
        raise ConfigError(f"predict: takes {_shapes(spec)}, pictures or paths; {kind} is not that")
    return _checked(spec, array[None] if array.shape == spec.shape else array, "predict")


def _checked(spec: DataSpec, array: NDArray[Any], what: str) -> Raw:
    where = what if what == "predict" else f"predict: {what}"
    if array.shape[1:] != spec.shape:
        raise ConfigError(f"{where}: an array of shape {array.shape}, but this network takes {_shapes(spec)}")
    if not len(array):
        raise ConfigError(f"{where}: there is no sample; give at least one")
    with np.errstate(over="ignore"):
        raw = array.astype(np.float32)
    finite = np.isfinite(raw).reshape(len(raw), -1).all(axis=1)
    if not finite.all():
        raise ConfigError(f"{where}: sample {int(finite.argmin())} holds a number that is not finite in 32 bits")
    return raw


def _of_csv(path: Path) -> NDArray[np.float64]:
    """Return the rows of a file of numbers between commas; a first line without any number names the columns.

    Raises:
        ConfigError: a cell is no number, or the rows have different lengths.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ConfigError(f"predict: {path}: cannot be read as CSV: {error}") from error
    if rows and not any(map(_is_number, rows[0][1])):
        del rows[0]
    width = len(rows[0][1]) if rows else 0
    for number, row in rows:
        where = f"predict: {path}, line {number}"
        if len(row) != width:
            raise ConfigError(f"{where}: {len(row)} cells, where the first row has {width}")
        for cell in row:
            if not _is_number(cell):
                raise ConfigError(f"{where}: {CONTROL.sub('?', cell[:40])!r} is no number")
    return np.array([[float(cell) for cell in row] for _, row in rows], dtype=np.float64).reshape(len(rows), width)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _existing(item: str | os.PathLike[str]) -> Path:
    path = Path(item).expanduser()
    if not path.is_file():
        raise ConfigError(f"predict: {path}: {'a folder; list its files' if path.is_dir() else 'no such file'}")
    return path


def _require_pictures(spec: DataSpec) -> None:
    if not spec.is_image or spec.shape[0] not in (1, 3):
        raise ConfigError(f"predict: this network takes {_shapes(spec)}, not pictures")


def _shapes(spec: DataSpec) -> str:
    inner = ", ".join(map(str, spec.shape))
    return f"numbers of shape ({inner}{',' if len(spec.shape) == 1 else ''}) or (N, {inner})"


def _name(item: Item) -> str:
    return "the picture" if isinstance(item, Image.Image) else str(item)
