"""Decodes the pictures of a split, all of them at once or batch by batch, and finds those that cannot be decoded.

Letters: N pictures of the split, C channels, S side.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from espalier.data import pictures
from espalier.data.loaders import Samples
from espalier.data.pictures import File, PictureError, Pixels
from espalier.errors import EspalierError

CHUNK = 1024  # pictures handed to the threads at a time
NUM_DECODED = 50_000  # pictures of a split that are decoded once beforehand, where they are not kept in memory


class Files(Protocol):
    """Picture files of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> Sequence[File | None]: ...

    def name(self, index: int) -> str: ...

    def marks(self, indices: Sequence[int]) -> Sequence[str]: ...


class Bad(NamedTuple):
    """A picture that cannot be used: its position in the split, its name for messages, and the reason."""

    place: int
    name: str
    reason: str


class ImageReader:
    """Pictures of one split as (C, S, S) uint8, decoded when they are asked for."""

    def __init__(
        self, files: Files, label_N: Tensor, shape: tuple[int, int, int], background: Sequence[int], source: str
    ) -> None:
        self.files = files
        self.label_N = label_N
        self.shape = shape
        self.background = tuple(background)
        self.source = source  # as messages name the data
        self.places = list(range(len(files)))

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitems__(self, indices: list[int]) -> Samples:
        """Raise `EspalierError` if a picture that was whole cannot be read any more, such as a file that is gone."""
        x = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        places = [self.places[index] for index in indices]
        for place, target, file in zip(places, x.numpy(), self.files[places], strict=True):
            try:
                target[:] = _channels_first(self._decode(file))
            except PictureError as error:
                raise EspalierError(f"{self.source}: {self.files.name(place)}: not read, {error}") from error
        return Samples(x, self.label_N[indices])

    def all(self) -> tuple[Samples, list[Bad]]:
        """Return the whole split, and the numbers of pictures that are left black because they cannot be decoded."""
        x = torch.zeros(len(self), *self.shape, dtype=torch.uint8)
        pixels = x.numpy()

        def decode(index: int, file: File | None) -> None:
            pixels[index] = _channels_first(self._decode(file))

        return Samples(x, self.label_N), self._tried(decode)

    def broken(self) -> list[Bad]:
        """Return the pictures that cannot be decoded; in very large splits, judge by head and end of each file."""
        if len(self) <= NUM_DECODED:
            return self._tried(lambda index, file: self._decode(file))
        return self._tried(lambda index, file: self._glance(file)) if _are_paths(self.files) else []

    def without(self, bad: Sequence[Bad]) -> "ImageReader":
        """Return the split without the bad pictures."""
        kept = _rest(len(self), bad)
        rest = ImageReader(self.files, self.label_N[kept], self.shape, self.background, self.source)
        rest.places = [self.places[index] for index in kept]
        return rest

    def fingerprint(self) -> str:
        """Return 16 hex digits that change if files are renamed, replaced, moved to other classes or sorted anew.

        Names and sizes stand for the files, none of which is read, so it is the same wherever the data lie.
        """
        marks = zip(self.files.marks(self.places), self.label_N.tolist(), strict=True)
        lines = "".join(f"{label} {mark}\n" for mark, label in marks)
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

    def _tried(self, job: Callable[[int, File | None], object]) -> list[Bad]:
        """Apply a function to each picture in one thread per CPU: decoders do not hold Python's lock."""

        def reason(index: int, file: File | None) -> str | None:
            try:
                job(index, file)
            except PictureError as error:
                return str(error)
            return None

        bad = []
        with ThreadPoolExecutor(_num_cpus()) as threads:
            for indices in _chunks(len(self)):
                files = self.files[[self.places[index] for index in indices]]
                for index, found in zip(indices, threads.map(reason, indices, files), strict=True):
                    if found is not None:
                        bad.append(Bad(index, self.files.name(self.places[index]), found))
        return bad

    def _decode(self, file: File | None) -> Pixels:
        return pictures.read(_present(file), self.shape, self.background)

    def _glance(self, file: File | None) -> None:
        pictures.num_pixels(_present(file))
        if not pictures.is_whole(_present(file)):
            self._decode(file)


def without(samples: Samples, bad: Sequence[Bad]) -> Samples:
    """Return the samples that are not bad."""
    if not bad:
        return samples
    kept = _rest(len(samples), bad)
    return Samples(samples.x[kept], samples.y[kept])


def _rest(num: int, bad: Sequence[Bad]) -> list[int]:
    left_out = {each.place for each in bad}
    return [index for index in range(num) if index not in left_out]


def _present(file: File | None) -> File:
    if file is None:
        raise PictureError("no picture")
    return file


def _are_paths(files: Files) -> bool:
    return len(files) > 0 and isinstance(files[[0]][0], str)


def _chunks(num: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK))


def _channels_first(pixels_HWC: Pixels) -> Pixels:
    return np.moveaxis(pixels_HWC, -1, 0)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
