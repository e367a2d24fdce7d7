"""Text to token ids and back, in numpy alone: the same code in training, in the server and in a script.

Id 0 pads, 1 is what the vocabulary lacks, the vocabulary begins at 2. Letters: N samples, T tokens.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from espalier.spec import FIRST, PAD, UNKNOWN, Cut, Input

WORD = re.compile(r"\w+|[^\w\s]")
NUM_BYTES = 256
Ids = NDArray[np.int64]


def pieces(text: str, cut: Cut) -> list[str]:
    """Return the words of a text in lower case, or its characters, or its bytes in hexadecimal."""
    if cut == "bytes":
        return [f"{byte:02x}" for byte in text.encode("utf-8", errors="replace")]
    text = unicodedata.normalize("NFC", text)
    return WORD.findall(text.lower()) if cut == "words" else list(text)


def vocabulary(texts: Iterable[str], cut: Cut, most: int) -> tuple[str, ...]:
    """Return the pieces that occur twice or more, the most frequent first, at most `most`; all bytes for bytes."""
    if cut == "bytes":
        return tuple(f"{byte:02x}" for byte in range(NUM_BYTES))
    counts = Counter(piece for text in texts for piece in pieces(text, cut))
    known = sorted((-count, piece) for piece, count in counts.items() if count > 1)
    return tuple(piece for _, piece in known[:most])


class Encoder:
    """Turns texts into ids by the vocabulary of an input."""

    def __init__(self, entry: Input, longest: int) -> None:
        self.cut = entry.cut
        self.longest = longest
        self.ids = {piece: number for number, piece in enumerate(entry.vocabulary, start=FIRST)}

    def __call__(self, text: str) -> Ids:
        """Return the ids of a text, (T,): at least one, at most the longest; what follows is cut off."""
        found = [self.ids.get(piece, UNKNOWN) for piece in pieces(text, self.cut)[: self.longest]]
        return np.array(found or [UNKNOWN], dtype=np.int64)


def padded(rows: Sequence[Ids]) -> Ids:
    """Return ids of several texts as one array, (N, T), each padded to the longest."""
    whole = np.full((len(rows), max(map(len, rows), default=1)), PAD, dtype=np.int64)
    for row, ids in zip(whole, rows, strict=True):
        row[: len(ids)] = ids
    return whole


def joined(arrays: Sequence[Ids]) -> Ids:
    """Return arrays (N, T) of different lengths T one after the other, padded to the longest."""
    return padded([row for array in arrays for row in array])
